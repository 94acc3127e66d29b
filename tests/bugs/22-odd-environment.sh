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
finish
