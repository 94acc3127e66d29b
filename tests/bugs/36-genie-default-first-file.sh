#!/bin/bash
# cni-genie/CNI-Genie#11, #98, #188: pods without annotations on a node with several networks, where
# genie.conf has no default_plugin. CNI-Genie takes the first file after its own, as the kubelet
# does. Expected: so does genie, for each pod; default_plugin decides where it is given.
. "$(dirname "$0")/lib.sh" || exit

bridge calico 10.61.0.0/29 '{"isDefaultGateway":true}'
bridge flannel 10.62.0.0/16 '{"isDefaultGateway":true}'
mv "$work/conf/10-flannel.conflist" "$work/conf/20-flannel.conflist"
network 00-genie.conf '{"cniVersion":"0.3.1","name":"k8s-pod-network","type":"genie",
  "log_level":"info","hostname":"n1","datastore_type":"kubernetes"}'
table
version=0.3.1

first=0
for i in 1 2 3 4 5; do
  pod "p$i"
  must add "c$i" "p$i"
  [[ $(addresses) != 10.61.* ]] || first=$((first + 1))
done
same "pods of five on the first file's network" "$first" 5
for i in 1 2 3 4 5; do must del "c$i" "p$i"; done

pod q
must add q q "$none" '{"default_plugin":"flannel"}'
matches "with default_plugin" "$(addresses)" '^10\.62\.'
must del q q
finish
