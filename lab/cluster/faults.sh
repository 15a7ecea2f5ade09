# What else fails, or comes late; story.sh plays it.

# Of each mirror what a restart, a new pod or a moment of not being Ready would change.
as_they_were() { kc get pods -n $NS -l "$OURS" -o json | jq -c '[.items[] | [.metadata.name, .metadata.uid, (.status.conditions[] | select(.type == "Ready") | [.status, .lastTransitionTime]),
  (.status.containerStatuses[] | [.restartCount, .state.running.startedAt])]] | sort'; }
pull_around() { # NAME NODE REFERENCE: on $cut, where kubelet waits for the API server before it starts a static pod, by containerd's client
  [ "$2" = "$cut" ] || { pull "$@"; return; }
  ctr "$2" images pull --hosts-dir /etc/containerd/certs.d "$3" > "$LOG/pulled" 2>&1 || fail "no pull on $2: $(tail -c 600 "$LOG/pulled")"
}
let_go() { rm -f "$LAB"/n*/static/*; } # the static pods end

step rolling
unbroken; unwatch; watch_pods
generation=$(generation)
before=$(kc get pods -n $NS -l "$OURS" -o name | sort)
helm upgrade peili "$CHART" --reuse-values --set podAnnotations.round=second > "$LOG/upgraded"
images=0; gave=0
until anew "$generation" > /dev/null; do
  [ $((SECONDS - BEGAN)) -lt 150 ] || fail "not rolled: $(kc get pods -n $NS -o wide | tail -n +2)"
  images=$((images + 1)); name=rolling-$images
  layer=$(make_image "$name")
  first=n$((images % N + 1))
  pull "$name" "$first" "images.lab/story/$name:1"
  for n in $(but "$first"); do order "$name" "$n" "images.lab/story/$name:1"; done
  for n in $(but "$first"); do pulled "$name" "$n"; done
  gave=$((gave + $(gets "$layer")))
done
after=$((SECONDS - BEGAN))
[ -z "$(comm -12 <(echo "$before") <(kc get pods -n $NS -l "$OURS" -o name | sort))" ] || fail "a pod was not replaced"
failed=$(kc get events -n story --field-selector reason=Failed -o json | jq -r '.items[] | "\(.involvedObject.name): \(.message)"')
[ -z "$failed" ] || fail "pulls failed: $failed"
# From when all are known to be Ready there are never two that are not.
least=$(jq -s --argjson n "$N" 'reduce .[] as $row ({least: $n}; .ready[$row[1]] = (($row[3] | not) and $row[4])
  | ([.ready[] | select(.)] | length) as $count | .all = (.all or $count == $n) | if .all then .least = ([.least, $count] | min) else . end) | .least' "$LOG/watch")
[ "$least" = $((N - 1)) ] || fail "$least pods were Ready at the least"
# With one mirror away its node and the first one ask the origin, and the third one has a peer.
[ $((images * N - gave)) -ge $images ] || fail "only $((images * N - gave)) of $((images * N)) came from peers"
unbroken
recovered
ok "all new after $after s, $least Ready at the least, none restarted; $((images * N)) pulls, none failed: the origin gave the layer $gave times, peers $((images * N - gave)) times"

step server-killed
unbroken; unwatch
before=$(as_they_were)
lab svc cp kill apiserver
within 60 "elections degraded" mode_is gossip-degraded
after=$((SECONDS - BEGAN))
for n in $NODES; do cause_is "$n" api-refused || fail "$(cause_is "$n" api-refused)"; done
PULL=pull_alone travels killed
BY=by_containerd within 30 "doctor's verdict" doctor_says api-refused
for n in $NODES; do
  within 30 "the verdict in metrics of $n" verdict_in_metrics "$n" api-refused
  ! verdict_in_metrics "$n" api-blocked > /dev/null || fail "$n says that a server that is off is blocked"
done
away=$((SECONDS - BEGAN))
lab svc cp start apiserver
within 60 "the API server" kc get --raw /readyz
recovered
# What kubelets tell of the static pods is told after what they have to tell of the mirrors.
for n in $NODES; do pulled killed "$n"; done
[ "$(as_they_were)" = "$before" ] || fail "the mirrors are not as they were: $before, now $(as_they_were)"
let_go
watch_pods
ok "away for $away s: degraded after $after s, doctor says api-refused; the same pods afterwards, Ready without a break, no restart; $SEEN"

step cut-off
# The node that leads, so that another has to.
within 30 "one leader" one_leader
cut=$(leaders); others=$(but "$cut")
lab block "$cut" drop
until mode_is gossip-degraded "$cut" > /dev/null && one_leader "$others" > /dev/null; do
  [ $((SECONDS - BEGAN)) -lt 60 ] || fail "no other leads, or the node that is cut off does not know it: $(mode_is gossip-degraded "$cut") $(one_leader "$others")"
  mode_is lease "$others" > "$LOG/last" || fail "$(cat "$LOG/last")"
done
after=$((SECONDS - BEGAN))
[ -z "$(leaders "$cut")" ] || fail "the node that is cut off leads, too"
cause_is "$cut" api-timeout > "$LOG/last" || fail "$(cat "$LOG/last")"
BY=by_containerd within 30 "doctor's verdict" doctor_says 'api-blocked|api-unreachable' "$cut"
codes=$(BY=by_containerd doctor "$cut")
within 30 "the verdict in metrics" verdict_in_metrics "$cut" 'api-(blocked|unreachable)'
doctor_says '' "$others" > "$LOG/last" || fail "$(cat "$LOG/last")"
PULL=pull_around travels cut
mode_is lease "$others" > "$LOG/last" || fail "$(cat "$LOG/last")"
lab unblock "$cut"
recovered
unbroken
ok "$cut, which led, is degraded and another leads after $after s; the others stay in mode lease; $cut says $codes; no restart; $SEEN"

step lease-deleted
uid() { kc get lease -n $NS peili -o jsonpath='{.metadata.uid} {.spec.holderIdentity}'; }
before=$(uid)
kc delete lease -n $NS peili > /dev/null
remade() { local now; now=$(uid) && [ "${now% *}" != "${before% *}" ] && [ -n "${now#* }" ]; }
within 60 "a new Lease that is held" remade
after=$((SECONDS - BEGAN))
recovered
unbroken
ok "there is another, and it is held, after $after s"

step containerd
n=n2; layer=$(make_image containerd); pull containerd $n images.lab/story/containerd:1
PID=$(mirror $n); PID=${PID#* }
lab svc $n stop containerd
stopped=$SECONDS
ready() { ask $n readyz > /dev/null || fail "$n is not ready: $(lab on $n curl -sS -m 5 http://127.0.0.1:5003/readyz)"; }
until [ "$(ask $n status | jq -r .store.health.state)" = degraded ]; do ready; [ $((SECONDS - stopped)) -lt 20 ] || fail "it does not say that its store is away"; done
BY=by_kernel within 20 "doctor's verdict" doctor_says containerd-absent $n
# What it has it gives all the same.
pull containerd n1 images.lab/story/containerd:1
[ "$(gets "$layer")" = 1 ] || fail "the origin gave the layer $(gets "$layer") times"
# Longer than kubelet needs to take it for not Ready (3 x 5 s), and shorter than it takes to give the node up (30 s).
while [ $((SECONDS - stopped)) -lt 18 ]; do ready; sleep 1; done
lab svc $n start containerd
away=$((SECONDS - stopped))
until [ "$(ask $n status | jq -r .store.health.state)" = ready ]; do ready; [ $((SECONDS - stopped)) -lt 60 ] || fail "it does not follow its store again"; done
recovered
travels containerd-again
all_ready $NS "$OURS" > /dev/null || fail "not all Ready"
unbroken
ok "away for $away s: ready all the time, doctor says containerd-absent, a peer had what it has; no restart; $SEEN"

step network
n=n3; PID=$(mirror $n); PID=${PID#* }
unbroken; unwatch
lab link $n down
lab on $n kill -9 "$PID"
again() { local now; now=$(mirror $n) && [ "${now#* }" != "$PID" ] && ask $n readyz; }
within 60 "the mirror ready without a network" again
after=$((SECONDS - BEGAN))
within 30 "the others without it" members $((N - 1)) "$(but $n)"
within 30 "one leader" one_leader "$(but $n)"
BY=by_containerd within 30 "doctor's verdict" doctor_says 'api-unroutable dns-.* mirror-alone' $n
codes=$(BY=by_containerd doctor $n)
lab link $n up
within 60 "all see all" members
back=$((SECONDS - BEGAN))
recovered
travels network
within 30 "all Ready" all_ready $NS "$OURS"
watch_pods
ok "started without a network: ready after $after s, says $codes; among the others again by itself; $SEEN"

step power
within 30 "one leader" one_leader
off=$(leaders); others=$(but "$off")
was=$(pod_on "$off"); restarts=$(kc get pod -n $NS "$was" -o jsonpath='{.status.containerStatuses[0].restartCount}')
lab power-off "$off"
within 30 "the others notice" members $((N - 1)) "$others"
noticed=$((SECONDS - BEGAN))
within 30 "one leader" one_leader "$others"
after=$((SECONDS - BEGAN))
mode_is lease "$others" > "$LOG/last" || fail "$(cat "$LOG/last")"
travels power-off "$others"; seen=$SEEN
doctor_says '' "$others" > "$LOG/last" || fail "$(cat "$LOG/last")"
on=$SECONDS
LIMIT=60 lab power-on "$off"
within 90 "it is among them again" members
back=$((SECONDS - on))
recovered
again() { kc get pod -n $NS "$was" -o json | jq -e --argjson was "$restarts" '.status.containerStatuses[0].restartCount == $was + 1 and any(.status.conditions[]; .type == "Ready" and .status == "True")'; }
within 60 "the same pod Ready again" again
travels power-on "$off $others"
unbroken "$off"
ok "$off, which led: the others notice after $noticed s, one of them leads after $after s, $seen; on again: among them after $back s, $SEEN"

step late
# Neither names nor API server when pods start that remember nobody; names come first.
unwatch
lab svc cp stop controllers
kc delete pods -n $NS -l "$OURS" --wait=false > /dev/null
none() { [ -z "$(kc get pods -n $NS -l "$OURS" -o name)" ]; }
within 60 "no pod" none
for n in $NODES; do lab on "$n" rm /var/lib/peili/view; done
lab svc cp stop dns
block
watch_pods
lab svc cp start controllers
within 90 "mirrors Ready" all_ready $NS "$OURS"
ready=$((SECONDS - BEGAN))
within 30 "doctor's verdicts" doctor_says '(api-blocked|api-unreachable) dns-[a-z]*'
codes=$(doctor n1)
lab svc cp start dns
within 60 "all see all, by names alone" members
within 30 "doctor's verdict" doctor_says 'api-blocked|api-unreachable'
unblock
recovered
travels late
unbroken
ok "Ready after $ready s, doctor says $codes; with names all found all; with the API server the mode is lease; $SEEN"

step hosts-wiped
# As a distribution does that owns the folder: all is gone, then its own is written.
n=n2
lab on $n rm -r /etc/containerd/certs.d
within 30 "doctor's verdict" doctor_says hosts-folder-missing $n
lab hosts $n
within 30 "doctor's verdict" doctor_says registry-not-set-up $n
layer=$(make_image wiped)
for n in $NODES; do pull wiped "$n" images.lab/story/wiped:1; done
[ "$(gets "$layer")" = 2 ] || fail "the origin gave the layer $(gets "$layer") times"
n=n2; unbroken
was=$(pod_on $n)
kc delete pod -n $NS "$was" --wait=false > /dev/null
within 60 "a new pod" all_ready $NS "$OURS"
[ "$(pod_on $n)" != "$was" ] || fail "the pod is the old one"
recovered
travels written
unbroken
ok "doctor says hosts-folder-missing, then registry-not-set-up, and pulls of that node go to the origin; a restart mends it; $SEEN"
