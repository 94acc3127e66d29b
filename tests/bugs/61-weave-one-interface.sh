#!/bin/bash
# Seen with Weave Net 2.8: it knows a container by its id alone. A second interface of it fails
# ("file exists"), and the DEL of any gives back every address of the container, so that the undo
# of a second attachment frees the address of a running pod. Expected: the second is refused before
# the plugin runs, with the reason.
. "$(dirname "$0")/lib.sh" || exit

mkdir "$work/ids" "$work/names"
plugin weave-net 0.1.0 0.2.0 0.3.0 <<'S'
id=$CNI_CONTAINERID
echo "$CNI_COMMAND $id $CNI_IFNAME" >> "$work/calls"
case $CNI_COMMAND in
ADD)
  if [ -f "$work/ids/$id" ] && [ "$(cat "$work/names/$id")" != "$CNI_IFNAME" ]; then
    echo '{"code":100,"msg":"could not create veth pair: file exists"}'
    exit 1
  fi
  n=2
  while grep -qx "10.32.0.$n" "$work"/ids/*; do n=$((n+1)); done
  echo "10.32.0.$n" > "$work/ids/$id"
  echo "$CNI_IFNAME" > "$work/names/$id"
  ip link add "vw$n" type veth peer name "$CNI_IFNAME" netns "$ns"
  ip link set "vw$n" up
  ip -n "$ns" addr add "10.32.0.$n/12" dev "$CNI_IFNAME"
  ip -n "$ns" link set "$CNI_IFNAME" up
  ip -n "$ns" route add default via 10.32.0.1 dev "$CNI_IFNAME"
  ip="\"version\":\"4\",\"address\":\"10.32.0.$n/12\",\"gateway\":\"10.32.0.1\""
  echo "{\"ips\":[{$ip}],\"dns\":{}}" ;;
DEL)
  rm -f "$work/ids/$id" "$work/names/$id"
  [ -z "$ns" ] || ip -n "$ns" link del "$CNI_IFNAME"
  exit 0 ;;
*) echo '{"code":100,"msg":"unknown CNI_COMMAND"}'; exit 1 ;;
esac
S
for name in weave weave-sub; do
  network "10-$name.conflist" \
    "{\"cniVersion\":\"0.3.0\",\"name\":\"$name\",\"plugins\":[{\"type\":\"weave-net\"}]}"
done
bridge br 10.66.0.0/24
table "$(defaults weave)"

pod a
must add a a "$(genie_selecting weave)"
address=$(cat "$work/ids/a")
echo "-- a second weave-net for a running pod"
switch_to() { operator switch demo/a --to "$1" > "$work/switch" 2>&1; }
expect "refused" not switch_to weave-sub@net5
expect "with the reason" grep -i "one interface" "$work/switch"
same "the address of the running pod" "$(cat "$work/ids/a")" "$address"
expect "no DEL of the running container" not grep -q "^DEL a" "$work/calls"
expect "eth0 is there" grep -q "$address" <<< "$(ip_of a addr show eth0)"
pod b
must add b b "$(genie_selecting weave)"
expect "another pod has another address" [ "$(cat "$work/ids/b")" != "$address" ]
expect "another network beside it" operator switch demo/b --to br@net1

echo "-- two of them in one annotation"
pod c
must not add c c "$(genie_selecting weave,weave-sub)"
expect "refused, with the reason" answers "one interface"
for name in c a b; do must del "$name" "$name"; done
same "addresses left" "$(ls "$work/ids")" ""
finish
