#!/bin/bash
# k8snetworkplumbingwg/multus-cni#1419: configs of the folder <conf dir>/<name>/ are chained to a
# list. Expected: to a list on disk. Not to the list of an object: its namespace may be anybody's,
# and a folder of the node is not meant for it.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
start_api
table "$(defaults blue)" "$(credentials)"
mkdir "$work/conf/chained" "$work/conf/blue"
network blue/50.conf '{"type":"tuning","mtu":1400}'
network chained/50.conf '{"type":"tuning","mtu":1400}'
network_object chained '{"cniVersion":"1.0.0","name":"chained","plugins":[
  {"type":"bridge","bridge":"brch",'"$(host_local 10.66.0.0/24)"'}]}'
mtu() { ip_of a -o link show "$1" | grep -o 'mtu [0-9]*'; }

pod a
must add c1 a "$(selecting chained)"
same "a list on disk" "$(mtu eth0)" "mtu 1400"
same "the list of an object" "$(mtu net1)" "mtu 1500"
must del c1 a
finish
