#!/bin/bash
# cni-genie/CNI-Genie#201 and #204 (genie.conf without cniVersion), #47, #48, #52, #53 (keys of a
# plugin's config get lost), #36 (any plugin); and what conf/1.8/launch.sh writes: a kubeconfig with
# neither server nor user, a token in genie.conf, keys of etcd and Romana that mean nothing.
# Expected: genie.conf works as it is; without a CA the remedy is told.
. "$(dirname "$0")/lib.sh" || exit

start_api
token=$(grep -o 'secret-[0-9a-f-]*' "$kubeconfig" | head -1)
plain=$kubeconfig
kubeconfig=$work/kubeconfig
plugin flannel 0.1.0 0.2.0 0.3.0 0.3.1 <<'S'
[ "$CNI_COMMAND" = ADD ] || exit 0
echo "$config" > "$work/given"
version=$(jq -r .cniVersion <<< "$config")
routes='"routes":[{"dst":"0.0.0.0/0"}]'
case $version in
0.1.0 | 0.2.0) ip='"ip":"10.244.1.7/24","gateway":"10.244.1.1"'
  echo "{\"cniVersion\":\"$version\",\"ip4\":{$ip,$routes}}" ;;
*) ip='"version":"4","address":"10.244.1.7/24","gateway":"10.244.1.1"'
  echo "{\"cniVersion\":\"$version\",\"ips\":[{$ip}],$routes}" ;;
esac
S
network 10-flannel.conf '{"name":"flannel","type":"flannel","subnetFile":"/run/flannel/subnet.env",
  "dataDir":"/var/lib/cni/flannel","delegate":{"bridge":"kbr0","isDefaultGateway":true,
  "hairpinMode":true,"mtu":1450,"forceAddress":false,"ipMasq":null,"list":[],"empty":{},
  "deep":{"a":[1,{"b":"ü\u0000é"}]}},"someKey":"x","f":1.5,"args":{"cni":{"k":"v"}}}'
table

# write_genie_conf JSON: genie.conf as launch.sh writes it, with these keys.
write_genie_conf() {
  jq -nc --arg api "$api" --arg token "$token" --arg kubeconfig "$kubeconfig" \
    --arg table "$work/plugins.toml" --argjson more "$1" '{
      name: "k8s-pod-network", type: "genie", plugins_file: $table, log_level: "debug",
      datastore_type: "kubernetes", hostname: "n1", policy: {type: "k8s", k8s_auth_token: $token},
      kubernetes: {k8s_api_root: $api, $kubeconfig}, etcd_endpoints: "http://192.0.2.9:2379",
      romana_root: "http://:", segment_label_name: "romanaSegment", cAdvisor_address: ""
    } + $more' > "$work/conf.json"
}
# write_kubeconfig CLUSTER [USER]: as launch.sh writes it, with these lines.
write_kubeconfig() {
  cat > "$kubeconfig" << Y
# Kubeconfig file for CNIGenie CNI plugin.
apiVersion: v1
kind: Config
clusters:
- name: local
  cluster:
$1
users:
- name: genie
${2-}
contexts:
- name: genie-context
  context:
    cluster: local
    user: genie
current-context: genie-context
Y
}
# start_pod NETWORK: the pod's annotation is at the API.
start_pod() {
  pod a
  pod_object c1 "$(genie_selecting "$1")"
  stdin=$work/conf.json add_by_api c1 a
}
end() {
  stdin=$work/conf.json must del c1 a
  [ ! -s "$work/out" ] || fault "DEL prints $(answer)"
  end_pod a
}
# try WHAT GENIE_CONF JQ: what is true of the answer.
try() {
  write_genie_conf "$2"
  start_pod flannel
  expect "$1" jq -e "$3" "$work/out"
  end
}
version='{"cniVersion":"0.3.1"}'
attached='.ips[0].address == "10.244.1.7/24"'
# By a CA that is found on the node, or refused with the remedy.
or_told="$attached or
  (.code == 7 and (.msg + (.details // \"\") | test(\"certificate-authority\")))"
ca="    certificate-authority: $work/api/ca.crt"
api_line="    server: $api"

write_kubeconfig "    insecure-skip-tls-verify: true"
try 'the kubeconfig as it is written' "$version" "$or_told"
write_kubeconfig "    insecure-skip-tls-verify: true"$'\n'"$api_line"
try 'with a server' "$version" "$or_told"
write_kubeconfig "$ca"
try 'with a CA' "$version" "$attached"
write_kubeconfig "$ca"$'\n'"$api_line"
try 'with both' "$version" "$attached"
write_kubeconfig "$ca"$'\n'"$api_line" "  user: {}"
try 'with an empty user too' "$version" "$attached"

cp "$plain" "$kubeconfig"
try 'without cniVersion, a result of 0.1.0 or 0.2.0' '{}' '.ip4.ip == "10.244.1.7/24"'
same 'the keys of the plugin' "$(jq -cS 'del(.cniVersion, .name, .runtimeConfig)' "$work/given")" \
  "$(jq -cS 'del(.name)' "$work/conf/10-flannel.conf")"
try 'cniVersion 0.2.0' '{"cniVersion":"0.2.0"}' \
  '.cniVersion == "0.2.0" and .ip4.ip == "10.244.1.7/24"'
try 'cniVersion 0.3.1' "$version" "$attached and .ips[0].version == \"4\""

# CNI-Genie names a network by what stands after the first dash of its file.
write_genie_conf "$version"
rm "$work"/conf/*
for file in 10-flannel.conf flannel.conf 10-my-flannel.conf 99-loopback-flannel.conflist; do
  case $file in
  *.conf) network "$file" '{"name":"other","cniVersion":"0.3.1","type":"flannel"}' ;;
  *) network "$file" '{"name":"other","cniVersion":"0.3.1","plugins":[{"type":"flannel"}]}' ;;
  esac
  name=${file%.*}
  start_pod "${name#*-}"
  expect "$file is ${name#*-}" answers 10.244.1.7
  end
  rm "$work/conf/$file"
done
finish
