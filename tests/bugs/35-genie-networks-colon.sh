#!/bin/bash
# cni-genie/CNI-Genie#149 and #161: interface names in the annotation `networks`, some given and
# some not. In every tagged release and in its sample pod the name stands after a colon; only the
# untagged master of May 2019 has "@". Expected: both are read, and free names go to the rest.
. "$(dirname "$0")/lib.sh" || exit

start_api
table "$(credentials 'status = "off"')"
for i in 1 2 3; do
  bridge "n$i" "10.6$i.0.0/24"
  logical_network "net$i" "{\"plugin\":\"n$i\"}"
done
# Interface and begin of the address of each.
given() {
  jq -r '. as $answer
    | [.ips[] | "\($answer.interfaces[.interface].name)=\(.address[0:5])"] | sort | join(" ")' \
    "$work/out"
}
count=0
try() {
  count=$((count + 1))
  pod a
  must add "c$count" a "$(genie_selecting '' "$1")"
  same "$1" "$(given)" "$2"
  must del "c$count" a
  end_pod a
}
try 'net1@eth2,net2, net3@eth1' 'eth0=10.62 eth1=10.63 eth2=10.61'
try 'net1,net2' 'eth0=10.61 eth1=10.62'
try 'net1:eth0,net2:eth4' 'eth0=10.61 eth4=10.62'
try 'net1:eth2,net2, net3:eth1' 'eth0=10.62 eth1=10.63 eth2=10.61'
try ' net1 : eth0 , net2 : eth1 ' 'eth0=10.61 eth1=10.62'
try 'net1,net1' 'eth0=10.61 eth1=10.61'

refuses() {
  pod a
  expect "refused: $1" not add refused a "$(genie_selecting '' "$1")"
  must del refused a
  end_pod a
}
refuses 'net1:eth0:eth1'
refuses 'net1:eth1,net2:eth1'
refuses 'net1:,net2'
refuses 'net1:lo,net2'
expect_no_lease
finish
