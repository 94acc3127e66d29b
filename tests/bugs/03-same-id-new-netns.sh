#!/bin/bash
# hashicorp/nomad#24292 and #24650 (the machine is rebooted), #25510 (a restart of the agent makes
# the namespace anew): the same id is ADDed again, with no DEL between. Expected: it is attached.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24 '{"isDefaultGateway":true}'
table "$(defaults blue)"

number() { stat -Lc %i "/run/netns/$node-a"; }
held=0
# Keeps the namespace of pod a under another name, so that the next one gets another number.
hold() {
  held=$((held + 1))
  local from=/run/netns/$node-a to=/run/netns/$node-held$held
  touch "$to"
  mount --bind "$from" "$to"
  umount "$from"
  rm "$from"
}
is() { [ "$(number)" = "$1" ]; }
# make_anew TEST...: a namespace at the same path, whose inode passes the test. The kernel gives the
# lowest free number, so those that do not pass are held. Fails where the number does not come back,
# because something else on the machine took it.
make_anew() {
  for _ in $(seq 60); do
    pod a
    ! "$@" || return 0
    hold
  done
  pod a
  return 1
}
# Nomad tries three times, until one succeeds.
add_as_nomad() { add "$1" a || add "$1" a || add "$1" a; }

echo "-- another boot id, the addresses gone"
pod a
must add alloc1 a
end_pod a
ip -n "$node" link del brblue
rm -rf "$work"/ipam/*
pod a
cat /proc/sys/kernel/random/uuid > "$work/boot"
cat > "$work/rebooted" <<S
#!/bin/sh
exec unshare -m --propagation private sh -c '
  mount --bind $work/boot /proc/sys/kernel/random/boot_id && exec $genie'
S
chmod +x "$work/rebooted"
plain=$genie
genie=$work/rebooted
expect "attached after a reboot" add alloc1 a
must del alloc1 a
genie=$plain
end_pod a

echo "-- in the same boot, another inode"
pod a
must add alloc2 a
cp "$work/out" "$work/result"
old=$(number)
end_pod a
make_anew not is "$old"
expect "CHECK misses what went with the old one" not check alloc2 a "$work/result"
expect "attached in another inode" add_as_nomad alloc2
must del alloc2 a
end_pod a

echo "-- in the same boot, the inode of the old one"
pod a
must add alloc3 a
old=$(number)
end_pod a
sleep 0.3
if ! make_anew is "$old"; then
  # From the outside, a namespace that was emptied is the same: its number, and no interface.
  must add alloc3 a
  ip_of a link del eth0
fi
expect "attached in the old inode" add_as_nomad alloc3
expect "a second ADD there is refused, as CNI demands" not add alloc3 a
expect "DEL" del alloc3 a
expect "ADD after it" add alloc3 a
end_pod a
pod a
expect "DEL, without an ADD in the new namespace" del alloc3 a
expect_no_lease
finish
