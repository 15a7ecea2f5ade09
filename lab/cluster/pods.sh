# An act of story.sh: the mirror in networks of its pods' own. The chart is upgraded to `networkMode: pod`; the runtime comes in by the hostPort
# and nobody else does; kube-router enforces NetworkPolicies, one of others cuts the mirrors off, and what doctor prints against it is applied.

address() { kc get pods -n $NS -l "$OURS" --field-selector "spec.nodeName=$1" -o json | jq -r '[.items[] | select(.metadata.deletionTimestamp == null) | .status.podIP][0] // empty'; }
# As kubelet asks: from the node.
ask() { lab on "$1" curl -fsS -m 5 "http://$(address "$1"):5003/$2"; }
in_pod() { # NODE ADDRESS CMD...: run in the network of that node's pod of this address
  lab on "$1" sh -c 'a=$1; shift; for f in /run/netns/*; do nsenter --net="$f" ip -o addr | grep -qF " $a/" && exec nsenter --net="$f" "$@"; done; echo "no pod has $a"; exit 99' sh "${@:2}"; }
closed() { # WHO CMD...: fails to get anything
  local who=$1 code=0; shift
  "$@" > "$LOG/closed" 2>&1 || code=$?
  [ $code != 0 ] && [ $code != 99 ] || fail "$who: $code $(cat "$LOG/closed")"; }

step pod-network
unwatch; watch_pods
generation=$(generation)
helm upgrade peili "$CHART" --reuse-values --set networkMode=pod,metrics.expose=false,podMonitor.enabled=false,prometheusRule.enabled=false > "$LOG/upgraded"
within 150 "pods in networks of their own" anew "$generation"
all_ready $NS "$OURS" > /dev/null || fail "not all Ready"
for n in $NODES; do [ "$(address "$n")" != "$(lab on cp sh -c "getent hosts $n" | cut -d' ' -f1)" ] || fail "the mirror of $n has the node's address"; done
recovered
travels pods
unbroken
ok "pods of their own networks, without a restart; doctor finds nothing; $SEEN"

step strangers
pull stranger n2 images.lab/story/pods:1
stranger=$(kc get pod -n story stranger-n2 -o json | jq -r .status.podIP); mirror=$(address n2)
before=$(metric n2 peili_registry_connections_refused_total)
[ "$(lab on n2 curl -sS -m 3 -o /dev/null -w '%{http_code}' http://127.0.0.1:5000/v2/)" = 200 ] || fail "the node's own runtime is not answered"
closed "another pod, at the mirror's address" in_pod n2 "$stranger" curl -sS -m 3 "http://$mirror:5000/v2/"
closed "another pod, at the node's address" in_pod n2 "$stranger" curl -sS -m 3 "http://$(lab on cp getent hosts n2 | cut -d' ' -f1):5000/v2/"
closed "another pod, at its own loopback" in_pod n2 "$stranger" curl -sS -m 3 http://127.0.0.1:5000/v2/
closed "another node" lab on n1 curl -sS -m 3 "http://$mirror:5000/v2/"
closed "another pod, at the admin port" in_pod n2 "$stranger" curl -sS -m 3 "http://$mirror:5003/status"
refused=$(($(metric n2 peili_registry_connections_refused_total) - before))
[ $refused = 2 ] || fail "$refused connections were refused"
ok "the node is answered at 127.0.0.1; another pod, at any address, and another node are not: two connections refused by Peili, the others by the network"

step one-pod
# Its node has an API server, and so have the other mirrors: kubelet goes on telling how it is.
others=$(but n2)
lab block-pod n2 "$(address n2)" drop
within 60 "its elections degraded" mode_is gossip-degraded n2
after=$((SECONDS - BEGAN))
cause_is n2 api-timeout > "$LOG/last" || fail "$(cat "$LOG/last")"
within 30 "another leads" one_leader "$others"
[ -z "$(leaders n2)" ] || fail "the one that is cut off leads, too"
within 30 "doctor's verdict" doctor_says 'api-blocked|api-unreachable' n2
codes=$(doctor n2)
doctor_says '' "$others" > "$LOG/last" || fail "$(cat "$LOG/last")"
travels one-pod
mode_is lease "$others" > "$LOG/last" || fail "$(cat "$LOG/last")"
lab unblock n2
recovered
unbroken
ok "the mirror of n2 is degraded after $after s and says $codes, those of the others stay in mode lease and find nothing; Ready, no restart; $SEEN"

step denied
# kube-router, and a policy that denies all to all pods of the namespace, as clusters have it that deny by default.
for n in $NODES; do lab svc "$n" start policy; done
kc apply -f - > /dev/null <<YML
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all, namespace: $NS}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
YML
enforced() { local n; for n in $NODES; do lab on "$n" iptables -w -S | grep -q "KUBE-POD-FW-.*$(address "$n")" || { echo "not on $n"; return 1; }; done; }
within 60 "the policy in force" enforced
# Connections that there are it leaves alone: the mirrors begin under it.
kc delete pods -n $NS -l "$OURS" --wait=false > /dev/null
within 90 "mirrors Ready" all_ready $NS "$OURS"
within 30 "the policy in force for them" enforced
within 60 "all alone" mode_is alone
within 30 "doctor's verdicts" doctor_says '.*api-(refused|unreachable|blocked).*'
codes=$(doctor n1)
pull denied n1 images.lab/story/pods:1
unbroken
ok "Ready behind a policy that denies all, without a restart; doctor says $codes; pulls go on"

step opened
apply_fixes n1
recovered 90
travels opened
unbroken
ok "applied $(paste -sd' ' "$LOG/fix-applied") as doctor printed it: mode lease, doctor finds nothing; $SEEN"

step policy
# The same by the chart's own policy, from the start.
kc delete -f "$LOG/fix.yaml" > /dev/null
helm upgrade peili "$CHART" --reuse-values --set 'networkPolicy.kind=kubernetes,networkPolicy.ports={443,6443,5000}' > "$LOG/upgraded"
kc delete pods -n $NS -l "$OURS" --wait=false > /dev/null
within 90 "mirrors Ready" all_ready $NS "$OURS"
within 30 "a policy in force for them" enforced
recovered
travels policy
unbroken
ok "by the chart's NetworkPolicy: mode lease, doctor finds nothing; $SEEN"
