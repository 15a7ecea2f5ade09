# What the stories on the cluster share; story.sh sources it, and says what it is given.
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
export LAB=${LAB:-$(mktemp -d "${TMPDIR:-/tmp}/peili-story.XXXXXX")}
N=${LAB_NODES:-3}; NODES=$(seq -f 'n%g' 1 "$N")
LOG=${STORY_LOG:-$LAB.log}; NS=peili; TAG=images.lab/peili:story; REG=${LAB_NET:-10.97}.0.1:5000
CHART=${CHART:-$HERE/../../deploy/chart}; HELM=${HELM:-helm}; PROMETHEUS=${PROMETHEUS:-prometheus}
# The mirrors: the chart's hooks have the same name, and components of their own.
OURS=app.kubernetes.io/name=peili,app.kubernetes.io/component=mirror
STEP=start; BEGAN=$SECONDS; WATCH=
LAYER=8388608 # bytes of the images that are pulled

lab() { timeout -k 5 "${LIMIT:-60}" "$HERE/lab.sh" "$@"; }
kc() { lab kubectl --request-timeout=20s "$@"; }
ctr() { lab on "$1" "$CONTAINERD_BIN/ctr" -n k8s.io "${@:2}"; } # NODE ...
# As its administrator does it, from the machine of the control plane.
helm() { LIMIT=${LIMIT:-120} lab on cp env HOME="$LAB" "$HELM" --kubeconfig "$LAB/pki/admin.conf" -n $NS "$@"; }
step() { STEP=$1; BEGAN=$SECONDS; }
ok() { echo "ok $STEP ($((SECONDS - BEGAN)) s): $*"; }
fail() { echo "FAILED $STEP ($((SECONDS - BEGAN)) s): $*"; exit 1; }
missing() { echo "missing: $*"; exit 3; }
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
  unwatch
  [ $code = 0 ] || [ $code = 3 ] || [ ! -e "$LAB/env" ] || diagnose
  if [ -z "${STORY_KEEP:-}" ]; then
    if [ -e "$LAB/env" ]; then LIMIT=120 lab down || { echo "the cluster in $LAB is not torn down"; [ $code != 0 ] || code=1; }; fi
    rmdir "$LAB" 2>/dev/null
  fi
  if [ $code = 0 ] || [ $code = 3 ]; then [ -n "${STORY_LOG:-}" ] || rm -rf "$LOG"; else echo "logs: $LOG"; fi
  exit $code
}
trap 'echo "FAILED $STEP: ${BASH_SOURCE[0]##*/}:$LINENO: $BASH_COMMAND"' ERR
trap finish EXIT; trap 'exit 130' INT; trap 'exit 143' TERM
mkdir -p "$LOG"

# ---- what is looked at ------------------------------------------------------------------------------------------------
# Where NODES may be given they are all nodes by default.
but() { local n; for n in $NODES; do [ "$n" = "$1" ] || echo "$n"; done; } # NODE -> the others
pod_on() { kc get pods -n $NS -l "$OURS" --field-selector "spec.nodeName=$1" -o json | jq -r '[.items[] | select(.metadata.deletionTimestamp == null) | .metadata.name][0] // empty'; }
ask() { lab on "$1" curl -fsS -m 5 "http://127.0.0.1:5003/$2"; } # NODE PATH
verdict_in_metrics() { ask "$1" metrics | grep -E "^peili_doctor_verdicts\{.*code=\"($2)\".* 1\$"; } # NODE CODE-PATTERN
metric() { # NODE START-OF-LINE -> value, 0 if there is none
  ask "$1" metrics | awk -v k="$2" 'index($0, k) == 1 && !f {print $NF; f = 1} END {if (!f) print 0}'; }
mode_is() { local n; for n in ${2:-$NODES}; do [ "$(metric "$n" "peili_election_mode{mode=\"$1\"}")" = 1 ] || { echo "$n is not in mode $1"; return 1; }; done; } # MODE [NODES]
cause_is() { local c; c=$(ask "$1" status | jq -r .election.cause); [[ $c =~ ^($2)$ ]] || { echo "the cause on $1 is $c"; return 1; }; } # NODE PATTERN
leaders() { local n; for n in ${1:-$NODES}; do [ "$(metric "$n" leader_election_master_status)" = 0 ] || echo "$n"; done; } # [NODES]
one_leader() { local l; l=$(leaders "${1:-}" | wc -l); [ "$l" = 1 ] || { echo "$l leaders"; return 1; }; } # [NODES]
members() { local n; for n in ${2:-$NODES}; do [ "$(metric "$n" 'peili_election_members ')" = "${1:-$N}" ] || { echo "$n sees $(metric "$n" 'peili_election_members ') members"; return 1; }; done; } # [NUMBER [NODES]]
all_ready() { # NAMESPACE SELECTOR: as many pods as nodes, none on its way out, each Ready
  kc get pods -n "$1" -l "$2" -o json | jq -e --argjson n "$N" '(.items | length) == $n and
    all(.items[]; .metadata.deletionTimestamp == null and any(.status.conditions[]?; .type == "Ready" and .status == "True"))' || { echo "not all Ready"; return 1; }; }
running() { # NODE LABEL-FILTER...: the containers that run there, each with its PID
  { ctr "$1" containers ls -q "$(IFS=,; echo "${*:2}")"; ctr "$1" tasks ls; } | awk 'NF == 1 {of[$1] = 1} $3 == "RUNNING" && $1 in of {print $1, $2; n++} END {exit !n}'; }
mirror() { running "$1" "labels.\"io.kubernetes.pod.namespace\"==$NS" 'labels."io.kubernetes.container.name"==peili'; } # NODE
# How a program is run in the mirror of a node: by kubectl, which needs the API server; by containerd; by the kernel alone.
by_kubectl() { local p; p=$(pod_on "$1"); [ -n "$p" ] || return 1; kc exec -n $NS "$p" -c peili -- "${@:2}"; }
by_containerd() { local c; c=$(mirror "$1"); ctr "$1" tasks exec --exec-id "story-$RANDOM" "${c% *}" "${@:2}"; }
by_kernel() { # $PID is the mirror's
  lab on "$1" bash -c 'mapfile -d "" -t e < "/proc/$1/environ"; exec env -i "${e[@]}" /usr/bin/nsenter -t "$1" -m -n -p -u -i -- "${@:2}"' sh "$PID" "${@:2}"; }
doctor() { # NODE -> its codes, sorted, and the report in $LOG/doctor-NODE.json; notes are none
  local code=0
  "${BY:-by_kubectl}" "$1" peili doctor --json > "$LOG/doctor-$1.json" 2> "$LOG/doctor-$1.err" || code=$?
  jq -r '[.verdicts[] | select(.severity != "note") | .code] | sort | join(" ")' "$LOG/doctor-$1.json"
}
doctor_says() { # CODE-PATTERN [NODES]: on every node these codes and no other
  local n c; for n in ${2:-$NODES}; do
    c=$(doctor "$n" || true); [ -s "$LOG/doctor-$n.json" ] && [[ $c =~ ^($1)$ ]] || { echo "doctor on $n says: ${c:-nothing}; $(cat "$LOG/doctor-$n.err")"; return 1; }; done; }
recovered() { # all is as it is to be
  within "${1:-60}" "all in mode lease" mode_is lease
  within 30 "one leader" one_leader
  within 30 "all see all" members
  within 60 "a doctor that finds nothing" doctor_says ''
}
anew() { # GENERATION: every mirror's pod is of a later one of the DaemonSet, and available
  kc get daemonset -n $NS peili -o json | jq -e --argjson n "$N" --argjson was "$1" '.metadata.generation > $was and .status.observedGeneration == .metadata.generation
    and .status.updatedNumberScheduled == $n and .status.numberAvailable == $n and .status.desiredNumberScheduled == $n'; }
generation() { kc get daemonset -n $NS peili -o jsonpath='{.metadata.generation}'; }
apply_fixes() { # NODE: what doctor writes there against what is wrong is applied as it is; $LOG/fix-applied has what that did
  by_kubectl "$1" peili doctor --fix-manifests /var/lib/peili/fix > "$LOG/doctor-fix" 2>&1 || true
  lab on "$1" sh -c 'for f in /var/lib/peili/fix/*; do echo ---; cat "$f"; done; rm -r /var/lib/peili/fix' > "$LOG/fix.yaml" || fail "it wrote no manifest: $(cat "$LOG/doctor-fix")"
  kc apply -f "$LOG/fix.yaml" > "$LOG/fix-applied" 2>&1 || fail "$(cat "$LOG/fix-applied")"
}
watch_pods() { # each change of a mirror's pod, as kubelet reports it, with the time
  setsid bash -c '"$1" kubectl get pods -n "$2" -l "$3" -w -o json | jq --unbuffered -c \
    "[(now | floor), .metadata.name, .status.phase, .metadata.deletionTimestamp != null,
      ([.status.conditions[]? | select(.type == \"Ready\") | .status][0] == \"True\"), ([.status.containerStatuses[]?.restartCount] | add // 0), .spec.nodeName]"' \
    sh "$HERE/lab.sh" $NS "$OURS" > "$LOG/watch" 2> "$LOG/watch.err" < /dev/null &
  WATCH=$!
}
unwatch() { [ -z "$WATCH" ] || kill -- "-$WATCH" 2>/dev/null || true; WATCH=; }
unbroken() { # [NODE]: no pod (but those of this node) that was Ready ceased to be while it was to be there, and no container of it was started again since the watch began
  kill -0 "$WATCH" 2>/dev/null || fail "nobody watched the pods to the end: $(cat "$LOG/watch.err")"
  local bad
  bad=$(jq -sc --arg but "${1:-}" 'map(select(.[6] != $but)) | group_by(.[1])[] | . as $rows | [$rows[] | select(.[3] | not)] as $live
    | ([$live[] | .[4]] | index(true)) as $from | $live[] as $row
    | select($row[5] > $rows[0][5] or ($from != null and ($row[4] | not) and (($live | index([$row])) > $from)))  | $row' "$LOG/watch")
  [ -z "$bad" ] || fail "a pod was not Ready, or started again: $bad"
}
block() { local n; for n in $NODES; do lab block-service "$n"; done; }
unblock() { local n; for n in $NODES; do lab unblock "$n"; done; }
answers() { lab on "$1" curl -ksS -m 3 -o /dev/null https://10.96.0.1:443/readyz; }
# What is in containerd's folders of a node, which the removal is to leave as it was.
files() { lab on "$1" sh -c 'cd /etc/containerd && find . | sort && find . -type f | sort | xargs sha256sum'; }

# ---- pulls -------------------------------------------------------------------------------------------------------------
make_image() { # NAME: with a layer that no other image has; prints the digest of the layer
  rm -rf "$LAB/root"; mkdir -p "$LAB/root"; cp "$LAB/pause" "$LAB/root/pause"
  head -c $LAYER /dev/urandom > "$LAB/root/content"
  lab image "images.lab/story/$1:1" "$LAB/root" '{"Entrypoint":["/pause"]}' > "$LOG/digest-$1"
  lab on cp curl -fsS "http://$REG/v2/story/$1/manifests/1" -H 'Accept: application/vnd.oci.image.manifest.v1+json' | jq -r '.layers[0].digest'
}
gets() { # DIGEST: complete answers to GET that the origin gave
  grep 'response completed' "$LAB/cp/log/registry" | grep 'method=GET' | grep -c "blobs/$1" || true; }
pod() { # NAME SPEC-LINE REFERENCE: a pod whose image has to be asked for
  cat <<YML
apiVersion: v1
kind: Pod
metadata: {name: $1, namespace: story}
spec:
  $2
  terminationGracePeriodSeconds: 0
  automountServiceAccountToken: false
  containers: [{name: c, image: "$3", imagePullPolicy: Always}]
YML
}
order() { pod "$1-$2" "nodeName: $2" "$3" | kc apply -f - > /dev/null; } # NAME NODE REFERENCE
pulled() { within 60 "the pod $1-$2" kc wait -n story --for=condition=Ready "pod/$1-$2" --timeout=5s; } # NAME NODE
pull() { order "$@"; pulled "$@"; } # NAME NODE REFERENCE: kubelet pulls it for a pod, which gets Ready
pull_alone() { # NAME NODE REFERENCE: the same where kubelet has no API server: by a static pod
  pod "$1" "hostNetwork: true" "$3" > "$LAB/$2/$1.yaml"; mv "$LAB/$2/$1.yaml" "$LAB/$2/static/"
  within 60 "the static pod of $3 on $2" running "$2" "labels.\"io.kubernetes.pod.name\"==$1-$2" 'labels."io.kubernetes.container.name"==c'
}
travels() { # NAME [NODES]: pulled by these nodes in turn, the origin gave its layer once
  local name=$1 nodes=${2:-$NODES} layer n before after from=0 others
  others=$(($(wc -w <<< "$nodes") - 1))
  layer=$(make_image "$name")
  for n in $nodes; do
    before=$(metric "$n" peili_mirror_peer_bytes_total)
    "${PULL:-pull}" "$name" "$n" "images.lab/story/$name:1"
    after=$(metric "$n" peili_mirror_peer_bytes_total)
    [ "$((after - before))" -lt $LAYER ] || from=$((from + 1))
  done
  [ "$(gets "$layer")" = 1 ] || fail "the origin gave the layer $(gets "$layer") times"
  [ "$from" = "$others" ] || fail "$from nodes had the layer from peers"
  SEEN="$name: origin gave the layer once, $from of $((others + 1)) nodes had it from peers"
}

# ---- the first steps, and the last --------------------------------------------------------------------------------------
begin() {
  local n kind
  step cluster
  LIMIT=180 lab up > "$LOG/up" 2>&1 || fail "$(tail -5 "$LOG/up")"
  LIMIT=120 lab load "$IMAGE" $TAG
  kc create namespace $NS > /dev/null; kc create namespace story > /dev/null
  ok "$(tail -1 "$LOG/up")"

  step deployed
  watch_pods
  for n in $NODES; do files "$n" > "$LOG/files-$n"; done
  # Definitions of the Prometheus operator, as far as the chart needs them: whatever is in them is taken.
  for kind in PodMonitor PrometheusRule; do
    jq -n --arg kind $kind --arg one "${kind,,}" '{apiVersion: "apiextensions.k8s.io/v1", kind: "CustomResourceDefinition",
      metadata: {name: "\($one)s.monitoring.coreos.com"}, spec: {group: "monitoring.coreos.com", scope: "Namespaced",
        names: {kind: $kind, listKind: "\($kind)List", plural: "\($one)s", singular: $one},
        versions: [{name: "v1", served: true, storage: true, schema: {openAPIV3Schema: {type: "object", "x-kubernetes-preserve-unknown-fields": true}}}]}}' | kc apply -f - > /dev/null
  done
  for kind in podmonitors prometheusrules; do within 20 "$kind" kc get $kind -A; done
  helm install peili "$CHART" --set image.repository=${TAG%:*},image.tag=${TAG##*:},image.pullPolicy=Never \
    --set "clusterKey.value=$(head -c 32 /dev/urandom | base64)" --set 'runtime.registries={images.lab}' \
    --set metrics.expose=true,podMonitor.enabled=true,prometheusRule.enabled=true ${STORY_VALUES:+--values "$STORY_VALUES"} > "$LOG/installed"
  within 90 "mirrors Ready" all_ready $NS "$OURS"
  local ready=$((SECONDS - BEGAN))
  within 60 "all in mode lease" mode_is lease
  within 30 "one leader" one_leader
  within 30 "all see all" members
  ok "Ready after $ready s, one leader"
}
removed() {
  local n
  step removed
  unwatch
  cmp -s <(files n1) "$LOG/files-n1" && fail "the chart wrote nothing into containerd's folders"
  helm uninstall peili --wait --timeout 100s > "$LOG/uninstalled"
  for n in $NODES; do files "$n" | diff "$LOG/files-$n" - > "$LOG/diff-$n" || fail "files of $n are others than before: $(paste -sd' ' "$LOG/diff-$n")"; done
  left() { [ -z "$(kc get daemonsets,jobs,pods,configmaps,services,serviceaccounts,roles,rolebindings,secrets -n $NS -l app.kubernetes.io/instance=peili -o name | tee /dev/stderr)" ]; }
  # Kubelet 1.20 may let go of an ended pod only when it next collects containers, once a minute.
  within 150 "nothing of it left" left
  make_image removed > /dev/null
  pull removed n1 images.lab/story/removed:1
  ok "containerd's folders are as they were on all nodes; nothing is left in the namespace; pulls go on"
}
