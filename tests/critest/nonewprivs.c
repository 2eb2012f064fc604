/* Says with whose rights it runs: root's, when its setuid bit was honoured. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	printf("Effective uid: %d\n", (int)geteuid());
	return 0;
}
