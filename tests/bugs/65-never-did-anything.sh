#!/bin/bash
# Seen with Weave in a list of CNI 0.4.0: the plugin refuses the version in ADD and in DEL alike,
# before it does anything. Expected: such a DEL does not fail and nothing stays on record, or every
# try of the kubelet would leave one more; and `genie validate` tells it beforehand.
. "$(dirname "$0")/lib.sh" || exit

plugin old 0.1.0 0.2.0 0.3.0 <<'S'
case $(jq -r .cniVersion <<< "$config") in
0.1.0 | 0.2.0 | 0.3.0) ;;
*) echo '{"code":1,"msg":"incompatible CNI versions"}'; exit 1 ;;
esac
[ "$CNI_COMMAND" != ADD ] || echo '{"ips":[{"version":"4","address":"10.9.0.2/24"}]}'
S
network 10-old.conflist '{"cniVersion":"0.4.0","name":"old","plugins":[{"type":"old"}]}'
table 'del_retry_window = "1s"' "$(defaults old)"

row=$(operator validate 2>&1 | grep '^old')
expect "validate: $row" grep -qv " ok " <<< "$row"
expect "with the version" grep -q '0\.4\.0' <<< "$row"
for i in 1 2 3; do
  pod a
  must not add "c$i" a
  expect "DEL of what was never made" del "c$i" a
  end_pod a
done
sleep 1.2
sed -i s/0.4.0/0.3.0/ "$work/conf/10-old.conflist"
must operator gc
# The same for an IPAM that is not installed, which the interface plugin alone can know.
network 10-old.conflist '{"cniVersion":"0.4.0","name":"old","plugins":[
  {"type":"bridge","bridge":"brold","ipam":{"type":"not-installed"}}]}'
pod a
must not add c4 a
expect "its DEL, without its IPAM" del c4 a
same "interfaces in the pod" "$(ip_of a -br link | awk '{print $1}')" lo
same "attachments on record" "$(operator report --json |
  jq '[.. | objects | select(.state? == "leaked" or .state? == "failing")] | length')" 0
finish
