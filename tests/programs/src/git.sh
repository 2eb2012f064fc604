#!/bin/sh
# git on files of its own making: commits, branches, clones, gc, fsck, worktrees, bundles.
set -e
rm -rf /tmp/git; mkdir /tmp/git; cd /tmp/git
export HOME=/tmp/git GIT_AUTHOR_DATE='2026-01-01T00:00:00Z' GIT_COMMITTER_DATE='2026-01-01T00:00:00Z'
git config --global user.name Somebody; git config --global user.email somebody@localhost
git config --global init.defaultBranch main; git config --global gc.autoDetach false
git init -q one; cd one
mkdir a b; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do echo "line $i" > a/$i; echo "$i" >> b/all; done
ln -s a/1 link; chmod +x a/2
git add .; git commit -qm first
for i in 1 2 3; do echo "change $i" >> b/all; git commit -qam "change $i"; done
git checkout -q -b side HEAD~2; echo side > side; git add side; git commit -qm side
git checkout -q main; git merge -q -m merged side
git tag -a -m tag v1
git stash list; echo dirty >> a/3; git stash -q; git stash pop -q; git diff --stat; git checkout -q a/3
git log --oneline --graph | cat
cd ..; git clone -q one two; git clone -q --no-local --bare one three.git; git clone -q file:///tmp/git/one four
cd two; echo two >> a/1; git commit -qam two; git push -q origin HEAD:refs/heads/two; git pull -q --no-rebase origin side
cd ../one; git gc -q --aggressive; git fsck --full --strict; git count-objects -v | grep -E 'count|in-pack|packs'
git worktree add -q ../wt side; git worktree list | wc -l
git rev-parse HEAD v1 two; git archive HEAD | sha256sum; git grep -c line | wc -l
git bundle create -q ../b.bundle --all; git -C ../two fetch -q ../b.bundle main; git status --short
echo git ok
