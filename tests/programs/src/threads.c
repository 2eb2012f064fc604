#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <locale.h>
#include <math.h>
#include <unistd.h>
#include <sys/wait.h>
#include <netdb.h>
#include <string.h>
static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER; static int n;
static void *f(void *x){for(int i=0;i<1000;i++){pthread_mutex_lock(&m);n++;pthread_mutex_unlock(&m);}return x;}
int main(void){pthread_t t[8];for(int i=0;i<8;i++)pthread_create(&t[i],0,f,0);for(int i=0;i<8;i++)pthread_join(t[i],0);
 printf("threads %d\n",n); FILE*p=popen("echo from the shell","r");char b[100];fgets(b,100,p);printf("%s",b);pclose(p);
 int pid=fork();if(!pid)_exit(7);int s;waitpid(pid,&s,0);printf("child %d, %.3f\n",WEXITSTATUS(s),sqrt(2));
 struct addrinfo *a;printf("getaddrinfo %d\n",getaddrinfo("localhost","80",0,&a));
 char *q=malloc(50<<20);memset(q,1,50<<20);q=realloc(q,60<<20);free(q);puts("c ok");return 0;}
