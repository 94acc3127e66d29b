#!/bin/bash
# cni-genie/CNI-Genie's e2e suite asks for "flannel,flannel". Seen with Flannel: it keeps one file
# per container with its delegate's config. The DEL of one interface takes that file, and the DEL of
# the other does nothing (exit 0): its address and its veth stay. Expected: nothing stays.
. "$(dirname "$0")/lib.sh" || exit

plugin flannel 0.3.1 0.4.0 1.0.0 <<'S'
dir=$(jq -r --arg dir "$work/flannel" '.dataDir // $dir' <<< "$config")
file=$dir/$CNI_CONTAINERID
mkdir -p "$dir"
case $CNI_COMMAND in
ADD)
  jq -c --arg dir "$work/ipam" '{cniVersion, name, type: "bridge", bridge: "cnif0",
    isDefaultGateway: true, ipam: {type: "host-local", dataDir: $dir,
      ranges: [[{subnet: "10.244.7.0/24"}]]}}' <<< "$config" > "$file"
  "$plugins/bridge" < "$file" ;;
DEL)
  [ -f "$file" ] || exit 0
  delegate=$(cat "$file")
  rm -f "$file"
  "$plugins/bridge" <<< "$delegate" ;;
esac
S
network 10-flannel.conflist '{"cniVersion":"0.3.1","name":"flannel","plugins":[{"type":"flannel"}]}'
table "$(defaults flannel)"

pod a
expect "attached" add a a "$(genie_selecting flannel,flannel)"
expect DEL del a a
expect_no_lease
same "interfaces in the pod" "$(ip_of a -br link | awk '{print $1}' | xargs)" lo
finish
