# The seed story; story.sh plays it.
HOLD=${SEED_HOLD:-60}
CONTROL=app.kubernetes.io/name=control

# ---- Prometheus ---------------------------------------------------------------------------------------------------------
prometheus() { # started with what the operator makes of the monitor and the rules, but for the interval
  kc get prometheusrule -n $NS peili -o json | jq .spec > "$LOG/rules.json"
  # Debian's has no discovery by Kubernetes: the pods and their ports are told as that would tell them.
  kc get pods -n $NS -o json | jq '[.items[] | . as $pod | .spec.containers[] | .ports[]? | {targets: ["\($pod.status.podIP):\(.containerPort)"], labels: ({
      __meta_kubernetes_namespace: $pod.metadata.namespace, __meta_kubernetes_pod_name: $pod.metadata.name, __meta_kubernetes_pod_container_port_name: .name}
      + ($pod.metadata.labels | with_entries(.key |= "__meta_kubernetes_pod_label_" + gsub("[^A-Za-z0-9_]"; "_"))))}]' > "$LOG/pods.json"
  kc get podmonitor -n $NS peili -o json | jq --arg pods "$LOG/pods.json" --arg rules "$LOG/rules.json" '.metadata as $of | .spec as $spec | {
    global: {evaluation_interval: "2s"}, rule_files: [$rules], scrape_configs: [$spec.podMetricsEndpoints[] | {
      job_name: "podMonitor/\($of.namespace)/\($of.name)/0", metrics_path: .path, scrape_interval: "2s", scrape_timeout: "2s",
      file_sd_configs: [{files: [$pods]}],
      relabel_configs: ([$spec.selector.matchLabels | to_entries[] | {action: "keep", regex: .value,
          source_labels: ["__meta_kubernetes_pod_label_" + (.key | gsub("[^A-Za-z0-9_]"; "_"))]}]
        + [{action: "keep", source_labels: ["__meta_kubernetes_pod_container_port_name"], regex: .port},
           {source_labels: ["__meta_kubernetes_namespace"], target_label: "namespace"},
           {source_labels: ["__meta_kubernetes_pod_name"], target_label: "pod"},
           {target_label: "job", replacement: "\($of.namespace)/\($of.name)"}])}]}' > "$LOG/prometheus.json"
  LIMIT=3600 lab on cp "$PROMETHEUS" --config.file="$LOG/prometheus.json" --storage.tsdb.path="$LAB/prometheus" --web.listen-address=127.0.0.1:9090 > "$LOG/prometheus" 2>&1 < /dev/null &
}
sees() { # NUMBER EXPRESSION: so many series
  local n
  n=$(lab on cp curl -fsS -m 5 http://127.0.0.1:9090/api/v1/query --data-urlencode "query=count($2)" | jq -r '.data.result[0].value[1] // "0"')
  [ "$n" = "$1" ] || { echo "$2: $n"; return 1; }
}

step scraped
prometheus
within 60 "all scraped" sees "$N" 'up{job="peili/peili"} == 1'
within 30 "their mode" sees "$N" 'peili_election_mode{mode="lease"} == 1'
within 30 "the leader" sees 1 'leader_election_master_status{name="peili"} == 1'
sees 0 'ALERTS{alertname="PeiliDown"}' || fail "an alert of nodes that are scraped"
ok "a Prometheus scrapes $N of $N by the PodMonitor, and sees one leader"

step healthy
within 30 "a doctor that finds nothing" doctor_says ''
travels healthy
unbroken
ok "doctor finds nothing; $SEEN"

step lost
block
for n in $NODES; do ! answers "$n" 2>/dev/null || fail "the block does not hold on $n"; done
within 90 "elections degraded" mode_is gossip-degraded
after=$((SECONDS - BEGAN))
travels lost
within 30 "doctor's verdict" doctor_says 'api-blocked|api-unreachable'
codes=$(doctor n1)
cp "$LOG/doctor-n1.json" "$LOG/verdict-lost.json"
place=$(jq -r .place.network "$LOG/verdict-lost.json")
[ "$place" = host ] || fail "doctor takes the network of a pod with host networking for $place"
for n in $NODES; do within 120 "the verdict in metrics of $n" verdict_in_metrics "$n" 'api-(blocked|unreachable)'; done
within 30 "their mode in Prometheus" sees "$N" 'peili_election_mode{mode="gossip-degraded"} == 1'
within 30 "the cause in Prometheus" sees "$N" 'peili_doctor_verdicts{code=~"api-(blocked|unreachable)"} == 1'
while [ $((SECONDS - BEGAN)) -lt "$HOLD" ]; do sleep 1; done
all_ready $NS "$OURS" > /dev/null || fail "not all Ready"
unbroken
ok "degraded after $after s, doctor says $codes, its metrics and a Prometheus too; Ready, no restart; $SEEN; $(for n in $NODES; do echo "$n dropped $(lab blocked "$n" | cut -d' ' -f1) packets"; done | paste -sd,)"

step regained
unblock
within 120 "all in mode lease" mode_is lease
within 30 "one leader" one_leader
within 60 "a doctor that finds nothing" doctor_says ''
unbroken
ok "elections by the lease again, no restart"

step control
restarts() { kc get pods -n "$1" -l "$2" -o json | jq -r '[.items[].status.containerStatuses[]?.restartCount] | "\(add // 0) \(min // 0)"'; }
# A program that is all right, but for a probe that waits for a leader: it reads the mirror's lease, by its account.
rm -rf "$LAB/root"; mkdir -p "$LAB/root"; cp "$LAB/pause" "$LAB/root/"; cp "$K8S_BIN/kubectl" "$LAB/root/"
cat > "$LAB/root/config" <<YML
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://10.96.0.1:443", certificate-authority: /var/run/secrets/kubernetes.io/serviceaccount/ca.crt}}]
users: [{name: u, user: {tokenFile: /var/run/secrets/kubernetes.io/serviceaccount/token}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
YML
lab image images.lab/control:1 "$LAB/root" '{"Entrypoint":["/pause"]}' import > /dev/null
cat > "$LOG/control.yaml" <<YML
apiVersion: v1
kind: Namespace
metadata: {name: control}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: control, namespace: control}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: control, namespace: $NS}
rules: [{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: control, namespace: $NS}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: control}
subjects: [{kind: ServiceAccount, name: control, namespace: control}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: control, namespace: control}
spec:
  selector: {matchLabels: {app.kubernetes.io/name: control}}
  template:
    metadata: {labels: {app.kubernetes.io/name: control}}
    spec:
      serviceAccountName: control
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      containers:
        - name: c
          image: images.lab/control:1
          imagePullPolicy: Never
          startupProbe: &leader
            exec: {command: [/kubectl, --kubeconfig=/config, --request-timeout=3s, get, lease, peili, -n, $NS, -o, "jsonpath={.spec.holderIdentity}"]}
            periodSeconds: 5
            timeoutSeconds: 4
            failureThreshold: 6
          readinessProbe: *leader
YML
kc apply -f "$LOG/control.yaml" > /dev/null
within 60 "the control, which has its API server, Ready" all_ready control $CONTROL
ok "its pods are Ready while they reach the API server"

step start
# Both start while nothing can be had of the API server.
block
BLOCKED=$SECONDS
kc delete pods -n control --all --wait=false > /dev/null
kc delete pods -n $NS -l "$OURS" --wait=false > /dev/null
within 90 "mirrors Ready without the API server" all_ready $NS "$OURS"
ready=$((SECONDS - BEGAN))
for n in $NODES; do ! answers "$n" 2>/dev/null || fail "the block does not hold on $n"; done
within 60 "all find all" members
travels start
within 30 "doctor's verdict" doctor_says 'api-blocked|api-unreachable'
codes=$(doctor n1)
ok "Ready after $ready s, doctor says $codes; $SEEN"

step origin-off
# Content that a neighbour has, with neither API server nor origin.
make_image off > /dev/null
pull off n1 images.lab/story/off:1
lab svc cp stop registry
for n in $NODES; do [ "$n" = n1 ] || pull off "$n" "images.lab/story/off@$(cat "$LOG/digest-off")"; done
lab svc cp start registry
ok "the other nodes pulled from a peer"

step killed
killed() { [ "$(restarts control $CONTROL | cut -d' ' -f2)" -ge 1 ] || { echo "restarts: $(restarts control $CONTROL)"; return 1; }; }
within 150 "kubelet kills every pod of the control" killed
after=$((SECONDS - BLOCKED))
while [ $((SECONDS - BEGAN)) -lt "$HOLD" ]; do sleep 1; done
! all_ready control $CONTROL > /dev/null || fail "the control is Ready"
all_ready $NS "$OURS" > /dev/null || fail "not all mirrors Ready"
unbroken
ok "kubelet restarted the control's containers $(restarts control $CONTROL | cut -d' ' -f1) times, each pod's within $after s of the block; none of the mirror's"

step lifted
unblock
within 120 "all in mode lease" mode_is lease
within 30 "one leader" one_leader
within 60 "a doctor that finds nothing" doctor_says ''
within 180 "the control Ready again" all_ready control $CONTROL
unbroken
ok "elections by the lease again, no restart of the mirror"
kc delete -f "$LOG/control.yaml" --wait=false > /dev/null

step fixed
# A right is taken away; what doctor prints is applied as it is, and gives it back.
kc get role -n $NS peili -o json | jq '(.rules[] | select(.resources == ["leases"]) | .verbs) |= map(select(. != "update"))' | kc apply -f - > /dev/null 2>&1
within 60 "doctor's verdict on the right" doctor_says '.*rights-lock.*'
codes=$(doctor n1)
apply_fixes n1
within 60 "a doctor that finds nothing" doctor_says ''
within 60 "one leader" one_leader
unbroken
ok "doctor said $codes; applied $(paste -sd' ' "$LOG/fix-applied"); cleared"
