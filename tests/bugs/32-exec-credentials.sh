#!/bin/bash
# kubernetes-sigs/aws-iam-authenticator#132, k8snetworkplumbingwg/multus-cni#106: a kubeconfig whose
# token a program of the cloud prints. Expected: it is run as kubectl does; where it fails, is
# missing or hangs, the answer names it, in time.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
start_api
pod_object c1 '{}'
token=$(grep -o 'secret-[0-9a-f-]*' "$kubeconfig" | head -1)
plain=$kubeconfig
kubeconfig=$work/kubeconfig
table "$(defaults blue)" "$(credentials 'status = "off"')"

# credentials_by COMMAND VERSION [ENV]
credentials_by() {
  sed '/^users:/,$d' "$plain"
  cat << Y
users:
- name: token
  user:
    exec:
      apiVersion: client.authentication.k8s.io/$2
      command: $1
      args: [token]
      env: ${3-null}
      installHint: get it from the vendor
      interactiveMode: Never
Y
}
# program NAME: a program in the folder of the kubeconfig, its script on stdin.
program() {
  { echo '#!/bin/sh'; cat; } > "$work/$1"
  chmod +x "$work/$1"
}
works() {
  pod a
  expect "$1" add_by_api c1 a
  must del c1 a
  end_pod a
}
fails() {
  pod a
  must not add_by_api c1 a
  expect "$1: $(error)" answers "$2"
  end_pod a
}
program auth << S
echo noise >&2
echo '{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1",
  "status":{"token":"$token"}}'
S
credentials_by "$work/auth" v1 > "$kubeconfig"
works "an absolute path, and words on stderr"
credentials_by "$work/auth" v1beta1 > "$kubeconfig"
works "v1beta1"
credentials_by ./auth v1 > "$kubeconfig"
works "a path relative to the kubeconfig"

program reading << S
cat > /dev/null
exec $work/auth
S
credentials_by "$work/reading" v1 > "$kubeconfig"
works "it reads stdin"
credentials_by "$work/auth" v1 '[{name: PROFILE}, {name: REGION, value: ""}]' > "$kubeconfig"
works "variables without a value"

credentials_by no-such-authenticator v1 > "$kubeconfig"
fails "missing" no-such-authenticator
program failing << 'S'
echo "refresh failed: region unknown" >&2
exit 3
S
credentials_by "$work/failing" v1 > "$kubeconfig"
fails "failing" "region unknown"

echo 'kill -KILL $$' | program killed
credentials_by "$work/killed" v1 > "$kubeconfig"
fails "killed" "printed nothing"
echo "echo not JSON, $token" | program garbage
credentials_by "$work/garbage" v1 > "$kubeconfig"
fails "garbage" "no credential"
expect "the token in it is not shown" not grep "$token" "$work/out" "$work/err"

echo 'exec sleep 60' | program hanging
credentials_by "$work/hanging" v1 > "$kubeconfig"
SECONDS=0
fails "hanging" "$kubeconfig"
expect "in time" [ "$SECONDS" -lt 20 ]
finish
