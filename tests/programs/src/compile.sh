#!/bin/sh
# gcc and musl-gcc make programs, make runs gcc in parallel.
set -e
rm -rf /tmp/cc; mkdir /tmp/cc; cd /tmp/cc
gcc -O2 -o p /t/threads.c -lm -pthread; ./p
gcc -static -O1 -o ps /t/threads.c -lm -pthread 2>/dev/null; ./ps
musl-gcc -O1 -o pm /t/threads.c; ./pm
musl-gcc -static -O1 -o pms /t/threads.c; ./pms
i=0; while [ $i -lt 12 ]; do echo "int f$i(int x){return x*$i+1;}" > f$i.c; i=$((i+1)); done
cat > main.c <<'M'
#include <stdio.h>
int f3(int),f11(int);
int main(void){printf("made %d\n",f3(f11(2)));return 0;}
M
cat > Makefile <<'M'
OBJ := $(patsubst %.c,%.o,$(wildcard *.c))
all: prog lib.a
	./prog
prog: $(OBJ)
	@gcc -o $@ $^
lib.a: $(OBJ)
	@ar rcs $@ $^
%.o: %.c
	@gcc -c -o $@ $<
M
# What it says of clocks is not told: in an emulated host a guest's may run away from the host's.
make -s -j4 2>errors || { cat errors; exit 1; }
make -s -j4 -q prog 2>errors && echo current
echo cc ok
