#!/bin/bash
# cni-genie/CNI-Genie, docs/network-isolation and sampleyamls/network-crd-yamls: two logical
# networks within the subnet of one bridge, beside a plain pod of it. Expected: addresses are of the
# logical network's part, gateway and mask those of the bridge, which can have one IPv4 address.
. "$(dirname "$0")/lib.sh" || exit

bridge phy 10.61.0.0/24 '{"isDefaultGateway":true}'
start_api
table "$(defaults phy)" "$(credentials 'status = "off"')"
logical_network net1 '{"plugin":"phy","sub_subnet":"10.61.0.16/28"}'
logical_network net2 '{"plugin":"phy","sub_subnet":"10.61.0.32/28"}'

declare -A address
# attach POD ANNOTATIONS REGEX: the address is like that.
attach() {
  pod "$1"
  must add "$1" "$1" "$2"
  matches "$1" "$(addresses)" "^$3/24\$"
  address[$1]=$(addresses)
}
part_of_net1='10\.61\.0\.(1[6-9]|2[0-9]|3[01])'
part_of_net2='10\.61\.0\.(3[2-9]|4[0-7])'
attach plain '{}' '10\.61\.0\.([2-9]|[1-9][0-9]+)'
attach a "$(genie_selecting '' net1)" "$part_of_net1"
attach b "$(genie_selecting '' net2)" "$part_of_net2"
attach a2 "$(genie_selecting '' net1)" "$part_of_net1"

reaches() {
  expect "$1 reaches $2" in_pod "$1" ping -c1 -W2 -q "${address[$2]%/*}"
}
reaches a b
reaches b a
reaches a plain
reaches plain b
reaches a a2
for name in plain a b a2; do must del "$name" "$name"; done
expect_no_lease
finish
