#!/bin/bash
# containernetworking/plugins#562 (an ifb stays), #585 and #1075 (sysctls of a secondary interface,
# names with dots): bandwidth and tuning in the chain of an object. Expected: they touch their own
# interface, and nothing stays of them.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
start_api
table "$(defaults blue)" "$(credentials 'status = "off"')"
network_object tuned '{"cniVersion":"1.0.0","name":"tuned","plugins":[
  {"type":"bridge","bridge":"brtuned",'"$(host_local 10.73.0.0/24)"'},
  {"type":"tuning","sysctl":{"net/ipv4/conf/IFNAME/arp_filter":"1"},"mtu":1300}]}'
network_object shaped '{"cniVersion":"1.0.0","name":"shaped","plugins":[
  {"type":"bridge","bridge":"brshaped",'"$(host_local 10.74.0.0/24)"'},
  {"type":"bandwidth","capabilities":{"bandwidth":true}}]}'
arp_filter() { in_pod a cat "/proc/sys/net/ipv4/conf/$1/arp_filter"; }
ifbs() { ip -n "$node" -br link show type ifb | wc -l; }

pod a
must add c1 a "$(selecting tuned)"
same "the sysctl on net1 and on eth0" "$(arp_filter net1) $(arp_filter eth0)" "1 0"
must del c1 a
end_pod a

# The tuning plugin cannot do this until 1.1.1; then nothing may be left by the failed ADD.
pod a
add c2 a "$(selecting tuned@eth0.100)" || must [ -z "$(leases)" ]
must del c2 a
expect_no_lease
end_pod a

pod a
must add c3 a "$(selecting '[{"name":"shaped","bandwidth":{"ingressRate":1000000,
  "ingressBurst":80000,"egressRate":2000000,"egressBurst":80000}}]')"
same "ifbs" "$(ifbs)" 1
end_pod a
expect "DEL after the namespace is gone" del c3
same "ifbs left" "$(ifbs)" 0
expect_no_lease
finish
