#!/bin/bash
# k8snetworkplumbingwg/multus-cni#1351: a plugin of an object's chain has "type:" for "type".
# Expected: refused before anything runs, with the names of object and key.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
start_api
table "$(defaults blue)" "$(credentials)"
network_object typo '{"cniVersion":"0.3.1","name":"typo","plugins":[
  {"type":"bridge","bridge":"brtypo",'"$(host_local 10.69.0.0/24)"'},
  {"type:":"vrf","vrfname":"blue"}]}'

pod a
expect "refused" not add c1 a "$(selecting typo)"
expect "the object is named" answers demo/typo
expect "the key is named" answers '\"type\"'
expect_no_lease
finish
