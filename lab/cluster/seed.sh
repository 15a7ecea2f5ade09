#!/usr/bin/env bash
# The seed story on a real cluster: a mirror whose API server is taken away goes on, and says why; one whose probe waits for
# a leader is killed by kubelet.
#
#   seed.sh            bring a cluster up (lab.sh), play the story, tear the cluster down
#
# Given by the environment:
#   K8S_BIN CONTAINERD_BIN ...   as for lab.sh, with all of LAB_*
#   IMAGE            OCI archive with Peili's image (`cargo xtask image` makes it)
#   HELM, CHART      helm (default: from PATH), and the chart (default: deploy/chart of this project)
#   PROMETHEUS       prometheus (default: from PATH): it scrapes by the chart's PodMonitor
#   SEED_LOG         folder for logs, kept (default: none are kept unless a step fails; then it says where)
#   SEED_VALUES      file with further values of the chart
#   SEED_HOLD=60     seconds for which the mirror has no API server, in each of the two ways
#   SEED_KEEP=       not empty: leave the cluster up
# Prints one line for each step, `ok STEP (SECONDS s): WHAT WAS SEEN`, and ends with 0 if all held; 1: `FAILED STEP: WHY`; 3: something
# is missing, said in one line, and nothing was run.
set -Eeuo pipefail
HERE=$(dirname "$(readlink -f "$0")")
export LAB=${LAB:-$(mktemp -d "${TMPDIR:-/tmp}/peili-seed.XXXXXX")}
HOLD=${SEED_HOLD:-60}; N=${LAB_NODES:-3}; NODES=$(seq -f 'n%g' 1 "$N")
LOG=${SEED_LOG:-$LAB.log}; NS=peili; TAG=images.lab/peili:seed
CHART=${CHART:-$HERE/../../deploy/chart}; HELM=${HELM:-helm}; PROMETHEUS=${PROMETHEUS:-prometheus}
# The mirrors: the chart's hooks have the same name, and components of their own.
OURS=app.kubernetes.io/name=peili,app.kubernetes.io/component=mirror
CONTROL=app.kubernetes.io/name=control
STEP=start; BEGAN=$SECONDS; WATCH=

lab() { timeout -k 5 "${LIMIT:-60}" "$HERE/lab.sh" "$@"; }
kc() { lab kubectl --request-timeout=20s "$@"; }
step() { STEP=$1; BEGAN=$SECONDS; }
ok() { echo "ok $STEP ($((SECONDS - BEGAN)) s): $*"; }
fail() { echo "FAILED $STEP ($((SECONDS - BEGAN)) s): $*"; exit 1; }
within() { # SECONDS WHAT CMD...: again and again until it succeeds
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" > "$LOG/last" 2>&1; do
    [ $SECONDS -lt $end ] || fail "not within its time: $what; last said: $(tail -c 600 "$LOG/last" | tr '\n' ' ')"
    sleep 0.5
  done
}
diagnose() { # what explains a failure, into $LOG
  { kc get nodes,pods,events -A -o wide; kc describe pods -n $NS
    for p in $(kc get pods -n $NS -o name); do echo "== $p"; kc logs -n $NS "$p" --all-containers --tail=200; kc logs -n $NS "$p" --all-containers --previous --tail=100; done
  } > "$LOG/pods" 2>&1 || true
  local m; for m in cp $NODES; do mkdir -p "$LOG/$m"; cp "$LAB/$m"/log/* "$LOG/$m/" 2>/dev/null || true; done
}
finish() {
  local code=$?
  trap - EXIT INT TERM ERR
  set +e
  [ -z "$WATCH" ] || kill -- "-$WATCH" 2>/dev/null
  [ $code = 0 ] || [ $code = 3 ] || [ ! -e "$LAB/env" ] || diagnose
  if [ -z "${SEED_KEEP:-}" ]; then
    if [ -e "$LAB/env" ]; then LIMIT=120 lab down || { echo "the cluster in $LAB is not torn down"; [ $code != 0 ] || code=1; }; fi
    rmdir "$LAB" 2>/dev/null
  fi
  if [ $code = 0 ] || [ $code = 3 ]; then [ -n "${SEED_LOG:-}" ] || rm -rf "$LOG"; else echo "logs: $LOG"; fi
  exit $code
}
trap 'echo "FAILED $STEP: line $LINENO: $BASH_COMMAND"' ERR
trap finish EXIT; trap 'exit 130' INT; trap 'exit 143' TERM
mkdir -p "$LOG"

# ---- what is looked at ------------------------------------------------------------------------------------------------
pod_on() { kc get pods -n $NS -l "$OURS" --field-selector "spec.nodeName=$1" -o json | jq -r '[.items[] | select(.metadata.deletionTimestamp == null) | .metadata.name][0] // empty'; }
metrics() { lab on "$1" curl -fsS -m 5 http://127.0.0.1:5003/metrics; } # NODE -> all
verdict_in_metrics() { metrics "$1" | grep -E '^peili_doctor_verdicts\{.*api-(blocked|unreachable).* 1$'; }
metric() { # NODE START-OF-LINE -> value, 0 if there is none
  metrics "$1" | awk -v k="$2" 'index($0, k) == 1 && !f {print $NF; f = 1} END {if (!f) print 0}'; }
mode_is() { local n; for n in $NODES; do [ "$(metric "$n" "peili_election_mode{mode=\"$1\"}")" = 1 ] || { echo "$n is not in mode $1"; return 1; }; done; }
one_leader() { local n l=0; for n in $NODES; do l=$((l + $(metric "$n" leader_election_master_status))); done; [ $l = 1 ] || { echo "$l leaders"; return 1; }; }
members() { local n; for n in $NODES; do [ "$(metric "$n" 'peili_election_members ')" = "$N" ] || { echo "$n sees $(metric "$n" 'peili_election_members ') members"; return 1; }; done; }
all_ready() { # NAMESPACE SELECTOR: as many pods as nodes, none on its way out, each Ready
  kc get pods -n "$1" -l "$2" -o json | jq -e --argjson n "$N" '(.items | length) == $n and
    all(.items[]; .metadata.deletionTimestamp == null and any(.status.conditions[]?; .type == "Ready" and .status == "True"))' || { echo "not all Ready"; return 1; }; }
restarts() { kc get pods -n "$1" -l "$2" -o json | jq -r '[.items[].status.containerStatuses[]?.restartCount] | "\(add // 0) \(min // 0)"'; }
doctor() { # NODE -> its codes, sorted, and the report in $LOG/doctor-NODE.json; notes are none
  local p code=0
  p=$(pod_on "$1"); [ -n "$p" ] || { echo "no-pod"; return 1; }
  kc exec -n $NS "$p" -c peili -- peili doctor --json > "$LOG/doctor-$1.json" 2> "$LOG/doctor-$1.err" || code=$?
  jq -r '[.verdicts[] | select(.severity != "note") | .code] | sort | join(" ")' "$LOG/doctor-$1.json"
}
doctor_says() { # CODE-PATTERN: on every node these codes and no other
  local n c; for n in $NODES; do c=$(doctor "$n"); [[ $c =~ ^($1)$ ]] || { echo "doctor on $n says: ${c:-nothing}"; return 1; }; done; }
watch_pods() { # each change of a mirror's pod, as kubelet reports it, with the time
  setsid bash -c '"$1" kubectl get pods -n "$2" -l "$3" -w -o json | jq --unbuffered -c \
    "[(now | floor), .metadata.name, .status.phase, .metadata.deletionTimestamp != null,
      ([.status.conditions[]? | select(.type == \"Ready\") | .status][0] == \"True\"), ([.status.containerStatuses[]?.restartCount] | add // 0)]"' \
    sh "$HERE/lab.sh" $NS "$OURS" > "$LOG/watch" 2> "$LOG/watch.err" < /dev/null &
  WATCH=$!
}
unbroken() { # no pod that was Ready ceased to be while it was to be there, and no container of it was started again
  kill -0 "$WATCH" 2>/dev/null || fail "nobody watched the pods to the end: $(cat "$LOG/watch.err")"
  local bad
  bad=$(jq -sc 'group_by(.[1])[] | . as $rows | [$rows[] | select(.[3] | not)] as $live
    | ([$live[] | .[4]] | index(true)) as $from | $live[] as $row
    | select($row[5] > 0 or ($from != null and ($row[4] | not) and (($live | index([$row])) > $from)))  | $row' "$LOG/watch")
  [ -z "$bad" ] || fail "a pod was not Ready, or started again: $bad"
}
block() { local n; for n in $NODES; do lab block-service "$n"; done; }
unblock() { local n; for n in $NODES; do lab unblock "$n"; done; }
answers() { lab on "$1" curl -ksS -m 3 -o /dev/null https://10.96.0.1:443/readyz; }

# ---- Prometheus ---------------------------------------------------------------------------------------------------------
definitions() { # of the Prometheus operator, as far as the chart needs them: whatever is in them is taken
  local kind
  for kind in PodMonitor PrometheusRule; do
    jq -n --arg kind $kind --arg one "${kind,,}" '{apiVersion: "apiextensions.k8s.io/v1", kind: "CustomResourceDefinition",
      metadata: {name: "\($one)s.monitoring.coreos.com"}, spec: {group: "monitoring.coreos.com", scope: "Namespaced",
        names: {kind: $kind, listKind: "\($kind)List", plural: "\($one)s", singular: $one},
        versions: [{name: "v1", served: true, storage: true, schema: {openAPIV3Schema: {type: "object", "x-kubernetes-preserve-unknown-fields": true}}}]}}' | kc apply -f - > /dev/null
  done
  for kind in podmonitors prometheusrules; do within 20 "$kind" kc get $kind -A; done
}
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

# ---- pulls -------------------------------------------------------------------------------------------------------------
make_image() { # NAME: a layer of 8 MiB that no other image has; prints the digest of the layer
  rm -rf "$LAB/root"; mkdir -p "$LAB/root"; cp "$LAB/pause" "$LAB/root/pause"
  head -c 8388608 /dev/urandom > "$LAB/root/content"
  lab image "images.lab/story/$1:1" "$LAB/root" '{"Entrypoint":["/pause"]}' > "$LOG/digest-$1"
  lab on cp curl -fsS "http://$REG/v2/story/$1/manifests/1" -H 'Accept: application/vnd.oci.image.manifest.v1+json' | jq -r '.layers[0].digest'
}
gets() { # DIGEST: complete answers to GET that the origin gave
  grep 'response completed' "$LAB/cp/log/registry" | grep 'method=GET' | grep -c "blobs/$1" || true; }
pull() { # NAME NODE REFERENCE: kubelet pulls it for a pod, which gets Ready
  kc apply -f - > /dev/null <<YML
apiVersion: v1
kind: Pod
metadata: {name: $1-$2, namespace: story}
spec:
  nodeName: $2
  terminationGracePeriodSeconds: 0
  automountServiceAccountToken: false
  containers: [{name: c, image: "$3", imagePullPolicy: Always}]
YML
  within 60 "the pod with $3 on $2" kc wait -n story --for=condition=Ready "pod/$1-$2" --timeout=5s
}
travels() { # NAME: pulled by every node in turn, the origin gave its layer once
  local name=$1 layer n before after from
  layer=$(make_image "$name"); from=0
  for n in $NODES; do
    before=$(metric "$n" peili_mirror_peer_bytes_total)
    pull "$name" "$n" "images.lab/story/$name:1"
    after=$(metric "$n" peili_mirror_peer_bytes_total)
    [ "$((after - before))" -lt 8388608 ] || from=$((from + 1))
  done
  [ "$(gets "$layer")" = 1 ] || fail "the origin gave the layer $(gets "$layer") times"
  [ "$from" = $((N - 1)) ] || fail "$from nodes had the layer from peers"
  SEEN="$name: origin gave the layer once, $from nodes had it from peers"
}

# ---- before ------------------------------------------------------------------------------------------------------------
missing() { echo "missing: $*"; exit 3; }
"$HERE/lab.sh" check || exit 3
[ -f "${IMAGE:-}" ] || missing "IMAGE, an archive of Peili's image"
command -v "$HELM" > /dev/null || missing helm
command -v "$PROMETHEUS" > /dev/null || missing prometheus
# As its administrator does it, from the machine of the control plane.
helm() { LIMIT=${LIMIT:-120} lab on cp env HOME="$LAB" "$HELM" --kubeconfig "$LAB/pki/admin.conf" -n $NS "$@"; }

step cluster
LIMIT=180 lab up > "$LOG/up" 2>&1 || fail "$(tail -5 "$LOG/up")"
REG=${LAB_NET:-10.97}.0.1:5000
LIMIT=120 lab load "$IMAGE" $TAG
kc create namespace $NS > /dev/null; kc create namespace story > /dev/null
ok "$(tail -1 "$LOG/up")"

# ---- the story ---------------------------------------------------------------------------------------------------------
step deployed
watch_pods
# What is in containerd's folders, which the removal is to leave as it was.
files() { lab on "$1" sh -c 'cd /etc/containerd && find . | sort && find . -type f | sort | xargs sha256sum'; }
for n in $NODES; do files "$n" > "$LOG/files-$n"; done
definitions
helm install peili "$CHART" --set image.repository=${TAG%:*},image.tag=${TAG##*:},image.pullPolicy=Never \
  --set "clusterKey.value=$(head -c 32 /dev/urandom | base64)" --set 'runtime.registries={images.lab}' \
  --set metrics.expose=true,podMonitor.enabled=true,prometheusRule.enabled=true ${SEED_VALUES:+--values "$SEED_VALUES"} > "$LOG/installed"
within 90 "mirrors Ready" all_ready $NS "$OURS"
ready=$((SECONDS - BEGAN))
within 60 "all in mode lease" mode_is lease
within 30 "one leader" one_leader
within 30 "all see all" members
ok "Ready after $ready s, one leader"

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
for n in $NODES; do within 120 "the verdict in metrics of $n" verdict_in_metrics "$n"; done
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
pod=$(pod_on n1)
kc exec -n $NS "$pod" -c peili -- peili doctor --fix-manifests /var/lib/peili/fix > "$LOG/doctor-fix" 2>&1 || true
kc exec -n $NS "$pod" -c peili -- peili doctor > "$LOG/doctor-text" 2>&1 || true
lab on n1 sh -c 'for f in /var/lib/peili/fix/*; do echo ---; cat "$f"; done; rm -r /var/lib/peili/fix' > "$LOG/fix.yaml" || fail "it wrote no manifest: $(cat "$LOG/doctor-fix")"
kc apply -f "$LOG/fix.yaml" > "$LOG/fix-applied" 2>&1 || fail "$(cat "$LOG/fix-applied")"
within 60 "a doctor that finds nothing" doctor_says ''
within 60 "one leader" one_leader
unbroken
ok "doctor said $codes; applied $(paste -sd' ' "$LOG/fix-applied"); cleared"

step removed
kill -- "-$WATCH" 2>/dev/null || true; WATCH=
cmp -s <(files n1) "$LOG/files-n1" && fail "the chart wrote nothing into containerd's folders"
helm uninstall peili --wait --timeout 100s > "$LOG/uninstalled"
for n in $NODES; do files "$n" | diff "$LOG/files-$n" - > "$LOG/diff-$n" || fail "files of $n are others than before: $(paste -sd' ' "$LOG/diff-$n")"; done
left() { [ -z "$(kc get daemonsets,jobs,pods,configmaps,services,serviceaccounts,roles,rolebindings,secrets -n $NS -l app.kubernetes.io/instance=peili -o name | tee /dev/stderr)" ]; }
within 60 "nothing of it left" left
pull healthy-again n1 images.lab/story/healthy:1
ok "containerd's folders are as they were on all nodes; nothing is left in the namespace; pulls go on"

echo "all held, $SECONDS s in all"
