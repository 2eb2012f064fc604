#!/bin/sh
# Runs in the container, as its first process: each test program of /list, one after the other.
# Lines of /list: seconds, name, command (with tabs between). What it prints is read by `run`.
list=$1
while IFS="$(printf '\t')" read -r seconds name command; do
    mkdir -p "/tmp/$name"
    chmod 1777 "/tmp/$name"
    echo "@@begin $name"
    cd "/tmp/$name" && TMPDIR=/tmp/$name setsid timeout -s KILL "$seconds" sh -c "$command" </dev/null 2>&1
    code=$?
    echo
    echo "@@end $name $code"
    # Whoever is left: the first process of a container is the only one that this does not reach.
    kill -9 -1 2>/dev/null
    cd / && rm -rf "/tmp/$name" 2>/dev/null
done <"$list"
echo "@@done"
