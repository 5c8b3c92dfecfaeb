#!/bin/sh
# Makes a profile the active one: sh profiles/switch.sh NAME
#
# The active profile's values are in params.yaml itself, and profiles/NAME.yaml is a link to it; every other profile is a
# file. So an edit through either name is the same edit, and DVC, which follows no links in git's history, finds the values
# of every commit (`dvc metrics diff`, `dvc artifacts get`, `dvc exp`).
set -eu
name=${1:-}
fail() { echo "profile: $1" >&2; exit 1; }

known=$(cd profiles && ls ./*.yaml 2>/dev/null | sed 's|^\./||; s|\.yaml$||' | tr '\n' ' ')
case " $known" in *" $name "*) [ -n "$name" ] ;; *) false ;; esac || fail "expected NAME= one of $known; got '$name'"
file=profiles/$name.yaml
if [ -L "$file" ] && [ "$(readlink "$file")" = ../params.yaml ]; then
  [ -f params.yaml ] || fail "$file: expected params.yaml, which it links to; restore it from git"
  echo "profile: $name"
  exit 0
fi
says=$(sed -n 's/^profile: *\([A-Za-z0-9_]*\).*/\1/p' "$file" | head -n 1)
[ "$says" = "$name" ] || fail "expected '$name', the name of $file, got '$says'; outputs lie under this name"
if [ -L params.yaml ]; then
  rm params.yaml # a link to a profile: nothing of its own to keep
elif [ -f params.yaml ]; then
  active=
  for each in profiles/*.yaml; do
    if [ -L "$each" ] && [ "$(readlink "$each")" = ../params.yaml ]; then active=$each; fi
  done
  [ -n "$active" ] || fail "params.yaml is no profile's; move it to profiles/NAME.yaml first"
  mv -f params.yaml "$active"
fi
mv "$file" params.yaml
ln -s ../params.yaml "$file"
echo "profile: $name"
