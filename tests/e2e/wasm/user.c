#include <stdio.h>

static void show(const char *name, const char *path) {
    char line[100];
    FILE *f = fopen(path, "r");
    if (f && fgets(line, sizeof line, f)) printf("%s: %s", name, line);
    else printf("%s: refused\n", name);
}

/* Makes a file named by its argument. */
int main(int argc, char **argv) {
    char path[100];
    show("secret", "/data/secret");
    show("team", "/data/team");
    snprintf(path, sizeof path, "/data/%s", argc > 1 ? argv[1] : "");
    return fopen(path, "w") ? 0 : 1;
}
