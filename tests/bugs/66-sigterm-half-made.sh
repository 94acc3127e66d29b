#!/bin/bash
# Seen with Weave: SIGTERM for an ADD, or a DEL that ends an ADD under way, killed the plugin in the
# middle; half-made links stayed in the pod and on the node. Expected: a plugin that is ended gets
# time to come to its end, and nothing stays.
. "$(dirname "$0")/lib.sh" || exit

plugin slow 0.4.0 1.0.0 <<'S'
far=h${CNI_CONTAINERID:0:6}
case $CNI_COMMAND in
ADD)
  ip link add "l$far" type veth peer name "g$far"
  sleep 0.4
  ip link set "g$far" netns "$ns"
  sleep 0.4
  ip -n "$ns" link set "g$far" name "$CNI_IFNAME"
  ip -n "$ns" addr add 10.9.0.2/24 dev "$CNI_IFNAME"
  ip -n "$ns" link set "$CNI_IFNAME" up
  ip link set "l$far" up
  interface="\"name\":\"$CNI_IFNAME\",\"sandbox\":\"$CNI_NETNS\""
  ip='"interface":0,"address":"10.9.0.2/24"'
  echo "{\"cniVersion\":\"1.0.0\",\"interfaces\":[{$interface}],\"ips\":[{$ip}]}" ;;
DEL) [ -z "$ns" ] || ip -n "$ns" link del "$CNI_IFNAME" ;;
esac
exit 0
S
network 10-slow.conflist '{"cniVersion":"1.0.0","name":"slow","plugins":[{"type":"slow"}]}'
table "$(defaults slow)"

# The process of genie that serves a container.
process_of() {
  local dir
  for dir in /proc/[0-9]*; do
    [ "$(readlink "$dir/exe")" = "$genie" ] || continue
    ! grep -qz "^CNI_CONTAINERID=$1\$" "$dir/environ" || echo "${dir##*/}"
  done 2> /dev/null
}
# end_midway HOW ID SECONDS: an ADD is ended by SIGTERM or by DEL, so many seconds after its begin.
end_midway() {
  local slot=-$2
  add "$2" "$2" &
  sleep "$3"
  if [ "$1" = SIGTERM ]; then
    local pid
    pid=$(process_of "$2")
    [ -z "$pid" ] || kill -TERM "$pid" || note "it has ended by itself"
    wait
  fi
  slot=-$2-del del "$2" "$2"
  wait
  del "$2" "$2"
}
pod whole
expect "an ADD that is left alone" add whole whole
must del whole whole
for how in SIGTERM DEL; do
  echo "-- $how at six moments"
  ids=()
  enders=()
  for i in 1 2 3 4 5 6; do
    id=$(printf '%06x' $((RANDOM * 7 + i)))
    ids+=("$id")
    pod "$id"
    end_midway "$how" "$id" "0.$((i + 2))" &
    enders+=($!)
  done
  wait "${enders[@]}"
  sleep 0.5
  same "$how: links left on the node" "$(ip -n "$node" -br link | grep -c '^[lg]h')" 0
  left=$(for id in "${ids[@]}"; do ip_of "$id" -br link | grep -v '^lo '; done)
  same "$how: links left in the pods" "$left" ""
done
finish
