#include <stdio.h>
#include <stdlib.h>

static void show(const char *name, const char *path) {
    char line[100];
    FILE *f = fopen(path, "r");
    if (f && fgets(line, sizeof line, f)) printf("%s: %s", name, line);
    else printf("%s: missing\n", name);
}

int main(int argc, char **argv) {
    printf("arguments: %s, %s\n", argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "");
    const char *who = getenv("WHO");
    printf("WHO=%s\n", who ? who : "");
    show("note", "/data/note");
    show("single", "/etc/single");
    FILE *f = fopen("/readonly/new", "w");
    printf("read-only: %s\n", f ? "written" : "refused");
    f = fopen("/data/out", "w");
    if (!f) { perror("out"); return 3; }
    fputs("written by C\n", f);
    fclose(f);
    fputs("to stderr\n", stderr);
    return 42;
}
