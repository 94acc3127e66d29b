#!/bin/bash
# Seen with Romana: its DEL gives the address back and leaves interface and route (exit 0); its ADD
# into a pod that has eth0 fails, and gives the address back. A repair of such a pod is DEL and ADD.
# Expected: afterwards the pod has an address, which is its own.
. "$(dirname "$0")/lib.sh" || exit

mkdir "$work/ids"
plugin romana 0.1.0 0.2.0 0.3.0 0.3.1 <<'S'
id=$CNI_CONTAINERID
case $CNI_COMMAND in
ADD)
  if ip -n "$ns" link show eth0; then
    rm -f "$work/ids/$id"
    echo '{"code":100,"msg":"file exists"}'
    exit 1
  fi >&2
  n=2
  while grep -qx "10.112.0.$n" "$work"/ids/*; do n=$((n+1)); done
  address=10.112.0.$n
  echo "$address" > "$work/ids/$id"
  ip link add "rv$n" type veth peer name eth0 netns "$ns"
  ip link set "rv$n" up
  ip -n "$ns" addr add "$address/32" dev eth0
  ip -n "$ns" link set eth0 up
  ip -n "$ns" route add default dev eth0
  ip route replace "$address" dev "rv$n"
  ip="\"version\":\"4\",\"address\":\"$address/32\""
  interface="\"name\":\"rv$n\""
  echo "{\"cniVersion\":\"0.3.1\",\"interfaces\":[{$interface}],\"ips\":[{$ip}],\"dns\":{}}" ;;
DEL) rm -f "$work/ids/$id" ;;
*) echo '{"code":100,"msg":"unknown CNI_COMMAND"}'; exit 1 ;;
esac
S
network 10-romana.conflist '{"cniVersion":"0.3.1","name":"romana","plugins":[{"type":"romana"}]}'
table "$(defaults romana)"
address_of() { ip_of "$1" -o -4 addr show eth0 | awk '{print $4}'; }

pod a
must add a a
operator repair demo/a --network romana > "$work/repair" 2>&1
note "repair: $(tail -1 "$work/repair")"
expect "the address is the pod's own" [ -f "$work/ids/a" ]
same "eth0 has it" "$(address_of a)" "$(cat "$work/ids/a")/32"
pod b
must add b b
expect "another pod has another: $(address_of b)" [ "$(address_of a)" != "$(address_of b)" ]
for name in a b; do must del "$name" "$name"; done
same "addresses left" "$(ls "$work/ids")" ""
finish
