#!/bin/bash
# containerd/nerdctl#3355: a DEL without CNI_NETNS comes before each ADD of the same id.
# Expected: no call fails, and no address is lost.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/29
table "$(defaults blue)"
for _ in $(seq 8); do
  pod a
  must del c1
  must add c1 a
  end_pod a
done
same "leases after 8 restarts on 5 addresses" "$(leases | wc -w)" 1
must del c1
expect_no_lease
finish
