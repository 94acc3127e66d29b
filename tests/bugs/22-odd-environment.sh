#!/bin/bash
# A sibling of case 05: no PATH and no HOME, and a folder of the caller that holds files which Bun
# reads elsewhere. Expected: genie works, and nothing of the folder is read.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24 '{"isDefaultGateway":true}'
bridge red 10.62.0.0/24 '{"isDefaultGateway":true}'
table "$(defaults blue red)"

pod a
bare=yes must add c1 a
same "default routes without variables" "$(ip_of a route show default | wc -l)" 1
bare=yes expect "DEL without variables" del c1 a
end_pod a

mkdir "$work/caller"
cd "$work/caller" || exit 1
echo 'console.log("FROM THE FOLDER")' > evil.ts
echo 'preload = ["./evil.ts"]' > bunfig.toml
echo 'CNI_IFNAME=dotenv' > .env
echo '{ broken' | tee package.json > tsconfig.json
pod a
must add c2 a
expect "nothing of the folder is read" not grep -q "FROM THE FOLDER" "$work/out" "$work/err"
must del c2 a
end_pod a
cd /

# What a runtime does not do, and a shell script of an operator may: streams that are closed.
# raw COMMAND: a call without any stream of ours.
raw() {
  on_node env -i CNI_COMMAND="$1" CNI_CONTAINERID=c3 CNI_NETNS="/run/netns/$node-a" \
    CNI_IFNAME=eth0 CNI_PATH="$plugins" "$genie"
}
pod a
raw ADD < "$work/stdin" >&- 2>&-
expect "ADD without stdout and stderr" ip_of a link show eth1
raw DEL <&- > "$work/out"
expect "DEL without stdin says why: $(error)" answers stdin
raw DEL < "$work/stdin" >&- 2>&-
same "after DEL without stdout and stderr" "$(ip_of a -br link | awk '{print $1}')" lo
expect_no_lease
raw VERSION <&- > "$work/out"
expect "VERSION without stdin" answers supportedVersions
finish
