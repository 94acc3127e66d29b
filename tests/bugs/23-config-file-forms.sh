#!/bin/bash
# k8snetworkplumbingwg/multus-cni#1506, containernetworking/cni#928 and #1164: forms of files in the
# conf dir. Expected: what libcni reads is read, and broken neighbours do no harm.
. "$(dirname "$0")/lib.sh" || exit

table "$(defaults blue)"
bridge_plugin='{"type":"bridge","bridge":"brblue",'"$(host_local 10.61.0.0/24)"'}'
body='"plugins":['$bridge_plugin']'
head='{"cniVersion":"1.0.0","name":"blue",'
list="$head$body}"

count=0
# try WHAT: a pod starts and ends; then the conf dir is emptied.
try() {
  count=$((count + 1))
  pod a
  expect "$1" add "c$count" a
  must del "c$count" a
  end_pod a
  rm -rf "$work/conf"
  mkdir "$work/conf"
}
printf '%s\r\n%s}\r\n' "$head" "$body" > "$work/conf/10-blue.conflist"
try "CRLF"

mkdir "$work/conf/..2026"
network ..2026/10-blue.conflist "$list"
ln -s ..2026 "$work/conf/..data"
ln -s ..data/10-blue.conflist "$work/conf/"
try "the links of a ConfigMap"

network 10-blue.conflist "$list"
ln -s /nonexistent "$work/conf/20-red.conflist"
mkdir "$work/conf/30-dir.conflist"
mkfifo "$work/conf/40-pipe.conf"
network 50-broken.conf '{'
try "a dangling link, a folder, a pipe and broken JSON beside it"

network 10-blue.conf "${bridge_plugin%\}},\"cniVersion\":\"1.0.0\",\"name\":\"blue\"}"
mkdir "$work/conf/blue"
network blue/5.conf '{"type":"absent"}'
try ".conf, for which no folder is read"

network 10-blue.json "$list"
try ".json"

network 10-blue.conflist '{"cniVersion":"1.0.0","name":"blue"}'
mkdir "$work/conf/blue"
network blue/1.conf "$bridge_plugin"
try "no key plugins, the folder alone"

network 10-blue.conflist "$head\"loadOnlyInlinedPlugins\":true,$body}"
mkdir "$work/conf/blue"
network blue/5.conf '{"type":"absent"}'
try "loadOnlyInlinedPlugins"

network 10-blue.conflist "$head\"disableCheck\":\"true\",$body}"
try "disableCheck as a text"

network 10-blue.conflist "{\"name\":\"blue\",$body}"
try "no cniVersion"

network 10-blue.conflist "$list"
{
  printf '\xef\xbb\xbf'
  sed 's/$/\r/' "$work/plugins.toml"
} > "$work/dos.toml"
mv "$work/dos.toml" "$work/plugins.toml"
try "a plugin table with byte order mark and CRLF"

# What libcni refuses is refused with the name of the file, before a plugin runs.
refuses() {
  printf '%b' "$2" > "$work/conf/10-blue.conflist"
  pod a
  must not add refused a
  expect "refused: $1" answers 10-blue.conflist
  must del refused a
  end_pod a
}
refuses "a byte order mark" "\\xef\\xbb\\xbf$list"
refuses "a comma too many" "$head\"plugins\":[$bridge_plugin,]}"
refuses "no plugins" "$head\"plugins\":[]}"
refuses "a plugin without a type" "$head\"plugins\":[$bridge_plugin,{\"Type\":\"tuning\"}]}"
refuses "a type with a path" "$head\"plugins\":[$bridge_plugin,{\"type\":\"../tuning\"}]}"
finish
