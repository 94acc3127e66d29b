# shellcheck shell=bash
# What every case stands on; a case begins by sourcing this. A case is a bug that users of
# genie's neighbours reported, or that was seen with their real programs, tried on the compiled
# program. It has a node of its own, which is a network namespace; its pods are further ones. All of
# it goes with the case, also when that fails.
#
# A case prints a line `OK ...` or `FAULT ...` for each thing it looks at, and exits with 1 where
# there was a fault. By hand, as root, after `bun run build`: `bash tests/bugs/NN-name.sh`.
# Environment: GENIE is the program, CNI_PLUGINS the folder of the reference plugins, BUN is Bun.
set -u

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
genie=$(realpath "${GENIE:-$root/dist/genie}")
plugins=${CNI_PLUGINS:-/usr/lib/cni}
work=$(mktemp -d "${TMPDIR:-/tmp}/genie-bug-XXXXXX")
node=genie-${GENIE_TEST_RUN:-test}-bug$$
none='{}'
kubeconfig=
api=
server=
faults=0

clean_up() {
  [ -z "$server" ] || kill "$server" 2> /dev/null
  local path
  for path in /run/netns/"$node" /run/netns/"$node"-*; do
    [ ! -e "$path" ] || ip netns del "${path##*/}"
  done
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 1' TERM INT

mkdir "$work"/{conf,bin,ipam}
ip netns add "$node"
ip -n "$node" link set lo up

# ---- What a case says.

ok() { echo "OK    $*"; }
fault() {
  echo "FAULT $*"
  faults=$((faults + 1))
}
note() { echo "      $*"; }

# expect WHAT COMMAND...: the command succeeds.
expect() {
  local what=$1
  shift
  if "$@" > "$work/said" 2>&1; then
    ok "$what"
  else
    fault "$what: $* said [$(head -c 300 "$work/said")] [$(answer)]"
  fi
}
# must COMMAND...: the same for a step that is not what the case is about.
must() { "$@" > "$work/said" 2>&1 || fault "$* said [$(cat "$work/said")] [$(answer)]"; }
not() { ! "$@"; }
# same WHAT IS SHOULD: two texts are equal.
same() {
  if [ "$2" = "$3" ]; then ok "$1: $2"; else fault "$1: [$2], expected [$3] [$(answer)]"; fi
}
# matches WHAT TEXT REGEX
matches() {
  if [[ $2 =~ $3 ]]; then ok "$1: $2"; else fault "$1: [$2], expected $3 [$(answer)]"; fi
}
# The end of every case.
finish() { [ "$faults" = 0 ]; exit; }

# ---- The node.

# table TOML...: the plugin table, besides its folders.
table() {
  {
    echo "conf_dir = \"$work/conf\""
    echo "bin_dirs = [\"$work/bin\", \"$plugins\"]"
    echo "state_dir = \"$work/state\""
    printf '%s\n' "$@"
  } > "$work/plugins.toml"
}
# defaults NETWORK...: for `table`, what a pod without annotations gets.
defaults() {
  echo "[default]"
  echo "networks = $(printf '%s\n' "$@" | jq -Rc . | jq -sc .)"
}
# credentials [TOML]: for `table`, the API server that `start_api` started.
credentials() { printf '[kubernetes]\nkubeconfig = "%s"\n%s\n' "$kubeconfig" "${1-}"; }
# network FILE JSON: a file of the conf dir.
network() { echo "$2" > "$work/conf/$1"; }
# host_local SUBNET: an IPAM section, for JSON.
host_local() {
  printf '"ipam":{"type":"host-local","dataDir":"%s","subnet":"%s"}' "$work/ipam" "$1"
}
# bridge NAME SUBNET [JSON]: the config list of a bridge; JSON is merged into its plugin.
bridge() {
  local plugin
  plugin="{\"type\":\"bridge\",\"bridge\":\"br$1\",$(host_local "$2")}"
  network "10-$1.conflist" "$(jq -nc --arg name "$1" --argjson plugin "$plugin" \
    --argjson more "${3-$none}" '{cniVersion: "1.0.0", $name, plugins: [$plugin + $more]}')"
}
# plugin NAME [VERSION...]: a plugin of the case's own, its script on stdin. It has $config (its
# stdin), $ns (name of the pod's namespace), $work, $plugins; it answers VERSION where versions are
# given.
plugin() {
  local path=$work/bin/$1
  shift
  {
    echo '#!/bin/bash'
    # shellcheck disable=SC2016  # for the plugin to expand
    echo 'config=$(cat) ns=${CNI_NETNS##*/}'
    echo "work=$work plugins=$plugins"
    if [ $# -gt 0 ]; then
      local versions
      versions=$(printf '%s\n' "$@" | jq -Rc . | jq -sc '{cniVersion: .[-1], supportedVersions: .}')
      echo "[ \"\$CNI_COMMAND\" != VERSION ] || { echo '$versions'; exit 0; }"
    fi
    cat
  } > "$path.new"
  chmod +x "$path.new"
  mv "$path.new" "$path"
}
on_node() { ip netns exec "$node" "$@"; }
# The addresses that host-local has given out.
leases() {
  find "$work/ipam" -name '[0-9]*.*.*.*' -o -name '*:*' | sort | xargs -r -n1 basename | xargs
}
expect_no_lease() { same "leases left" "$(leases)" ""; }

# ---- Pods.

pod() {
  ip netns add "$node-$1"
  ip -n "$node-$1" link set lo up
}
end_pod() { ip netns del "$node-$1"; }
in_pod() {
  local name=$1
  shift
  ip netns exec "$node-$name" "$@"
}
# ip_of POD WORDS...: `ip` in its namespace.
ip_of() {
  local name=$1
  shift
  ip -n "$node-$name" "$@"
}

# ---- Calls of genie.

# call COMMAND ID POD [IFNAME [JSON]]: a CNI call; no POD means no CNI_NETNS, and JSON is merged
# into the config. The answer is $work/out. Variables for it, as in `args=a=b call ADD c1 a`:
#   annotations  what the runtime hands over, as JSON; empty where it hands over none
#   args         CNI_ARGS
#   version      cniVersion of the call, 1.0.0 unless told otherwise
#   stdin        a file in place of the config
#   bare         not empty: there are no variables but those of CNI
#   slot         a text for the names of its files, for calls that run beside each other
call() {
  local netns=${3:+/run/netns/$node-$3} handed=$none clean=()
  local args=${args-"IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=$2"}
  [ -z "${annotations-}" ] ||
    handed="{\"runtimeConfig\":{\"io.kubernetes.cri.pod-annotations\":$annotations}}"
  [ -z "${bare-}" ] || clean=(-i)
  jq -nc --arg version "${version-1.0.0}" --arg table "$work/plugins.toml" \
    --argjson handed "$handed" --argjson more "${5-$none}" \
    '{cniVersion: $version, name: "genie", type: "genie", plugins_file: $table} * $handed * $more' \
    > "$work/stdin${slot-}"
  on_node timeout --foreground 60 env "${clean[@]}" \
    CNI_COMMAND="$1" CNI_CONTAINERID="$2" CNI_NETNS="$netns" CNI_IFNAME="${4-eth0}" \
    CNI_PATH="$work/bin:$plugins" CNI_ARGS="$args" \
    "$genie" < "${stdin-$work/stdin${slot-}}" > "$work/out${slot-}" 2> "$work/err${slot-}"
}
# add ID POD [ANNOTATIONS [JSON]]: the runtime hands the annotations over, none of them unless told.
# Succeeds where genie does, and answers with a result.
add() { annotations=${3-$none} call ADD "$1" "$2" eth0 "${4-$none}" && answers cniVersion; }
# add_by_api ID POD [JSON]: the same, and the annotations come from the API.
add_by_api() { annotations='' call ADD "$1" "$2" eth0 "${3-$none}" && answers cniVersion; }
# del ID [POD [JSON]]
del() { annotations='' call DEL "$1" "${2-}" eth0 "${3-$none}"; }
# check ID POD FILE: FILE has the answer of its ADD.
check() { annotations='' call CHECK "$1" "$2" eth0 "{\"prevResult\":$(cat "$3")}"; }
# What genie answered, in short.
answer() { [ ! -e "$work/out" ] || tr '\n' ' ' < "$work/out" | cut -c1-400; }
error() { jq -r '"code \(.code): \(.msg)"' "$work/out"; }
answers() { grep -qF -- "$1" "$work/out${slot-}"; }
# The addresses of the answer.
addresses() { jq -r '[.ips[]?.address] | join(" ")' "$work/out"; }
# The interfaces of the pod and the addresses in the answer.
attached() {
  jq -r '[.interfaces[] | select(.sandbox).name] + [.ips[].address] | join(" ")' "$work/out"
}
# operator WORDS...: a command of the operator, for the CNI config that names the table.
operator() {
  echo "{\"name\":\"genie\",\"type\":\"genie\",\"plugins_file\":\"$work/plugins.toml\"}" \
    > "$work/genie.conf"
  on_node timeout --foreground 60 "$genie" "$@" --cni-config "$work/genie.conf"
}

# ---- The Kubernetes API.

# Starts tests/apiserver.ts on the node: $api is its URL, $kubeconfig the file for it.
start_api() {
  mkdir "$work/api"
  # Not by `on_node`: $! would be a shell that waits for it.
  ip netns exec "$node" "${BUN:-bun}" "$root/tests/apiserver.ts" --dir "$work/api" \
    > "$work/api.line" 2> "$work/api.err" &
  server=$!
  for _ in $(seq 200); do
    [ ! -s "$work/api.line" ] || break
    sleep 0.1
  done
  api=$(jq -r .url "$work/api.line")
  kubeconfig=$(jq -r .kubeconfig "$work/api.line")
}
# object PATH JSON: makes an object; null deletes it.
object() {
  on_node curl -sfk --noproxy '*' -X POST "$api/-/objects" -d "{\"$1\":$2}" > "$work/said" ||
    fault "the API server does not take $1"
}
# network_object NAME CONFIG [NAMESPACE]
network_object() {
  object "/apis/k8s.cni.cncf.io/v1/namespaces/${3-demo}/network-attachment-definitions/$1" \
    "$(jq -nc --arg config "$2" '{spec: {$config}}')"
}
# logical_network NAME SPEC, physical_network NAME SPEC: of CNI-Genie.
logical_network() {
  object "/apis/alpha.network.k8s.io/v1/namespaces/demo/logicalnetworks/$1" "{\"spec\":$2}"
}
physical_network() {
  object "/apis/alpha.network.k8s.io/v1/namespaces/demo/physicalnetworks/$1" "{\"spec\":$2}"
}
# pod_object NAME ANNOTATIONS [UID [NAMESPACE]]
pod_object() {
  object "/api/v1/namespaces/${4-demo}/pods/$1" \
    "{\"metadata\":{\"uid\":\"${3-uid-$1}\",\"annotations\":$2},\"spec\":{}}"
}
# selecting TEXT: annotations that select networks of the NPWG specification.
selecting() { jq -nc --arg text "$1" '{"k8s.v1.cni.cncf.io/networks": $text}'; }
# genie_selecting CNI [NETWORKS]: annotations of CNI-Genie.
genie_selecting() {
  jq -nc --arg cni "$1" '{$cni}' | jq -c '. + $ARGS.named' ${2+--arg networks "$2"}
}
