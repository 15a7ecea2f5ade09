#!/usr/bin/env bash
# A real Kubernetes of several nodes on one machine, without a container engine: etcd, a control plane, and nodes.
#
# Every machine of the cluster ("cp" for the control plane, n1, n2, ... for the nodes) is a process tree with its own
# network, mount, PID, UTS, IPC and cgroup namespace, its own containerd and its own kubelet. Nodes have the usual paths
# (/run/containerd/containerd.sock, /var/lib/kubelet, /etc/containerd/certs.d), each private to the node, so that one
# DaemonSet with hostPath volumes fits them all. The network (a bridge) lives in cp's namespace: nothing of the host's
# own interfaces, routes, iptables or sysctls is touched. NOTES.md beside this file: what it is, what it is not, traps.
#
#   lab.sh up                    bring it up, wait until every node is Ready
#   lab.sh down                  tear it all down (safe to repeat)
#   lab.sh check                 say what is missing to bring it up, if anything (exit 3)
#   lab.sh kubectl ARGS...       kubectl as cluster-admin
#   lab.sh on M CMD...           run CMD on machine M (cp, n1, ...)
#   lab.sh svc M start|stop|kill|restart|status SERVICE
#                                cp: etcd apiserver scheduler controllers registry dns names; nodes: containerd kubelet proxy, and policy (not started by `up`)
#   lab.sh image NAME:TAG ROOTFS CONFIG_JSON [import]
#                                make an image of a folder; push it to the registry on cp, or import it on every node
#   lab.sh load ARCHIVE NAME:TAG import an image's OCI archive on every node, by this name
#   lab.sh block N drop|reject [UID]    cut the API server off at node N (all of it, or only for processes of UID)
#   lab.sh block-service N              drop what goes to the API server by its Service address: all pods, but not kubelet and kube-proxy
#   lab.sh block-pod N IP drop|reject   cut the API server off for one pod of a node's CNI bridge
#   lab.sh blocked N             packets and bytes that those rules of node N have dropped
#   lab.sh unblock N
#   lab.sh link N down|up               take node N's interface down, with its routes, and up again
#   lab.sh power-off N | power-on N     the whole node at once, as if its plug were pulled
#   lab.sh hosts N                      write node N's hosts.toml anew, as its distribution would
#   A manifest in $LAB/N/static is a static pod of node N: kubelet runs it without being told by an API server.
#   lab.sh pause | resume        freeze and thaw the whole cluster (cgroup freezer)
#   lab.sh memory                resident memory by program
#
# Given by the environment:
#   K8S_BIN         folder with kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl etcd
#                   docker-registry runc, and cni/ with bridge host-local loopback portmap (`cargo xtask setup` makes it)
#   CONTAINERD_BIN  folder with containerd containerd-shim-runc-v2 ctr      (1.6 or 1.7: kubelet 1.20 speaks CRI v1alpha2)
#   KUBE_ROUTER     kube-router, for the service `policy`; needs ipset
#   ETCD CNI_BIN RUNC REGISTRY DNSMASQ   each of these from elsewhere (default: of K8S_BIN; dnsmasq from PATH)
#   LAB             state folder (default: $TMPDIR/peili-cluster-$UID), not below /etc /opt /run /var/lib /var/log, not on an overlay
#   LAB_NODES=3     LAB_PREFIX=pc (names of the network namespaces)   LAB_NET=10.97 (x.0.0/24 nodes, x.N.0/24 pods of node N)
#   LAB_NICE=0      LAB_KUBELET_ARGS= LAB_CONTROLLER_ARGS= LAB_APISERVER_ARGS= (extra flags)
# Needs root, iproute2, iptables, util-linux, openssl, jq, curl, dnsmasq, a C compiler with a static libc, and cgroup v1 mounted.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
LAB=${LAB:-${TMPDIR:-/tmp}/peili-cluster-$UID}
NODES=${LAB_NODES:-3}; PREFIX=${LAB_PREFIX:-pc}; NET=${LAB_NET:-10.97}
API=$NET.0.1; SVC_NET=10.96.0; REG=$API:5000; DNS=$SVC_NET.10
if [ -n "${K8S_BIN:-}" ]; then
  ETCD=${ETCD:-$K8S_BIN/etcd}; CNI_BIN=${CNI_BIN:-$K8S_BIN/cni}; RUNC=${RUNC:-$K8S_BIN/runc}; REGISTRY=${REGISTRY:-$K8S_BIN/docker-registry}
fi
DNSMASQ=${DNSMASQ:-dnsmasq}
PAUSE=images.lab/pause:1

die() { echo "lab.sh: $*" >&2; exit 1; }
need() { local v; for v; do [ -n "${!v:-}" ] || die "set $v (see the head of this script)"; done; }
nodes() { seq -f 'n%g' 1 "$NODES"; }
ip_of() { echo "$NET.0.$((10 + ${1#n}))"; }
wait_for() { # SECONDS WHAT CMD...
  local n=$(( $1 * 5 )) what=$2; shift 2
  while ! "$@" >/dev/null 2>&1; do n=$((n - 1)); [ $n -gt 0 ] || die "gave up waiting for $what"; sleep 0.2; done
}

# ---- cgroups (v1): one per machine in each hierarchy, below the caller's own --------------------------------------
make_cgroups() { # MACHINE -> list of folders in $LAB/M/cgroups
  local id ctl path d
  : > "$LAB/$1/cgroups"
  while IFS=: read -r id ctl path; do
    [ -n "$ctl" ] || continue
    d=/sys/fs/cgroup/${ctl#name=}${path%/}
    [ -d "$d" ] || die "no cgroup v1 hierarchy at $d"
    mkdir -p "$d/$PREFIX-$1"
    if [ "$ctl" = cpuset ]; then
      cat "$d/cpuset.effective_cpus" > "$d/$PREFIX-$1/cpuset.cpus"; cat "$d/cpuset.effective_mems" > "$d/$PREFIX-$1/cpuset.mems"
    fi
    echo "$d/$PREFIX-$1" >> "$LAB/$1/cgroups"
  done < /proc/self/cgroup
}
join_cgroups() { local d; while read -r d; do echo "$BASHPID" > "$d/cgroup.procs"; done < "$LAB/$1/cgroups"; }
drop_cgroups() { # deepest first; waits a little for the kernel to let go
  [ -f "$LAB/$1/cgroups" ] || return 0
  local d i
  while read -r d; do
    for i in 1 2 3 4 5 6 7 8 9 10; do
      [ -d "$d" ] || break
      find "$d" -depth -type d -exec rmdir {} \; 2>/dev/null || true
      [ -d "$d" ] && sleep 0.2
    done
    [ ! -d "$d" ] || echo "lab.sh: left behind: $d" >&2
  done < "$LAB/$1/cgroups"
}
freeze() { local m; for m in cp $(nodes); do
  [ -f "$LAB/$m/cgroups" ] && echo "$1" > "$(grep /freezer/ "$LAB/$m/cgroups")/freezer.state"; done; }

# ---- machines -------------------------------------------------------------------------------------------------------
boot() { # MACHINE: start its first process, in namespaces of its own
  local m=$1 i
  mkdir -p "$LAB/$m/log" "$LAB/$m/run"
  make_cgroups "$m"
  ( join_cgroups "$m"
    exec nsenter --net="/run/netns/$PREFIX-$m" nice -n "${LAB_NICE:-0}" \
      unshare --mount --uts --ipc --pid --cgroup --fork --kill-child "$SELF" __init "$m" \
      < /dev/null > "$LAB/$m/log/init" 2>&1 ) &
  for i in $(seq 50); do [ -s "$LAB/$m/ready" ] && break; sleep 0.1; done
  [ -s "$LAB/$m/ready" ] || { cat "$LAB/$m/log/init" >&2; die "$m did not start"; }
  # the child of `unshare` is PID 1 inside; its number outside is what nsenter needs
  echo $! > "$LAB/$m/unshare.pid"
  cat "/proc/$!/task/$!/children" | tr -d ' ' > "$LAB/$m/pid"
}
__init() { # runs as PID 1 of a machine
  local m=$1 d c
  mount --make-rprivate /
  mount -t proc proc /proc
  umount -R /sys 2>/dev/null || umount -l -R /sys
  mount -t sysfs sysfs /sys          # shows this network namespace's interfaces
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  while IFS=: read -r _ c _; do
    [ -n "$c" ] || continue
    d=/sys/fs/cgroup/${c#name=}; mkdir "$d"
    case $c in name=*) c=none,$c;; esac
    mount -t cgroup -o "$c" cgroup "$d"
  done < /proc/self/cgroup
  mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/lock
  for d in /etc /opt /var/lib /var/log; do       # private, on top of the host's
    c=$LAB/$m/fs${d//\//-}; mkdir -p "$c/upper" "$c/work"
    mount -t overlay -o "lowerdir=$d,upperdir=$c/upper,workdir=$c/work" overlay "$d"
  done
  for d in /var/lib/containerd /var/lib/kubelet /var/log/pods /run/containerd /etc/containerd /etc/cni; do
    c=$LAB/$m/fs${d//\//-}; mkdir -p "$c" "$d"; mount --bind "$c" "$d"
  done
  mkdir -p /var/log/containers
  # kubelet insists on writing these, and they belong to the whole host: give it files to write
  mkdir /run/sysctl
  for d in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    c=/run/sysctl/${d//\//-}; cat "/proc/sys/$d" > "$c"; mount --bind "$c" "/proc/sys/$d"
  done
  mount --make-rshared /
  hostname "$m"
  rm -f /etc/resolv.conf; echo 'nameserver 127.0.0.1' > /etc/resolv.conf   # refused at once; the host's would time out from here
  printf '127.0.0.1 localhost\n%s images.lab\n' "$API" > /etc/hosts
  for d in $(nodes); do echo "$(ip_of "$d") $d" >> /etc/hosts; done
  if [ "$m" != cp ]; then
    sysctl -qw net.ipv4.ip_forward=1
    sysctl -qw net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true
  fi
  echo up > "$LAB/$m/ready"
  exec "$LAB/pause"                  # reaps orphans, ends on SIGTERM
}
on() { # MACHINE CMD...
  local m=$1 p; shift
  p=$(cat "$LAB/$m/pid" 2>/dev/null) && [ -d "/proc/$p" ] || die "$m is not running"
  ( join_cgroups "$m"; exec nsenter -t "$p" -m -u -i -n -p -C nice -n "${LAB_NICE:-0}" "$@" )
}
power_off() {
  local m=$1 p d
  [ "$m" = cp ] || ip -n "$PREFIX-cp" link set "$m" down 2>/dev/null || true   # nobody hears its sockets end
  for p in "$(cat "$LAB/$m/pid" 2>/dev/null)" "$(cat "$LAB/$m/unshare.pid" 2>/dev/null)"; do
    [ -n "$p" ] && grep -qsF "$LAB" "/proc/$p/cmdline" "/proc/$p/environ" && kill -9 "$p" 2>/dev/null || true
  done
  while read -r d; do # everything of the machine has its PID 1's fate; wait for it
    for p in $(seq 50); do [ -s "$d/cgroup.procs" ] || break; [ -n "$(cat "$d/cgroup.procs" 2>/dev/null)" ] || break; sleep 0.1; done; break
  done < <(cat "$LAB/$m/cgroups" 2>/dev/null)
  drop_cgroups "$m"
  rm -f "$LAB/$m/pid" "$LAB/$m/unshare.pid" "$LAB/$m/ready" "$LAB/$m"/run/*.pid "$LAB/$m/cgroups"
}

# ---- services -------------------------------------------------------------------------------------------------------
command_of() { # MACHINE SERVICE -> array CMD
  local m=$1 k=$LAB/pki
  case $2 in
    etcd) CMD=("$ETCD" --name cp --data-dir "$LAB/cp/etcd" --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
        --listen-peer-urls http://127.0.0.1:2380 --unsafe-no-fsync) ;;
    apiserver) CMD=("$K8S_BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --advertise-address="$API" --secure-port=6443
        --client-ca-file="$k/ca.crt" --tls-cert-file="$k/apiserver.crt" --tls-private-key-file="$k/apiserver.key"
        --kubelet-client-certificate="$k/admin.crt" --kubelet-client-key="$k/admin.key" --kubelet-certificate-authority="$k/ca.crt"
        --kubelet-preferred-address-types=InternalIP
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$k/sa.pub" --service-account-signing-key-file="$k/sa.key"
        --service-cluster-ip-range="$SVC_NET.0/24" --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction
        --allow-privileged=true ${LAB_APISERVER_ARGS:-}) ;;
    controllers) CMD=("$K8S_BIN/kube-controller-manager" --kubeconfig="$k/controllers.conf" --leader-elect=false --use-service-account-credentials
        --root-ca-file="$k/ca.crt" --service-account-private-key-file="$k/sa.key" --port=0 ${LAB_CONTROLLER_ARGS:-}) ;;
    scheduler) CMD=("$K8S_BIN/kube-scheduler" --kubeconfig="$k/scheduler.conf" --leader-elect=false --port=0) ;;
    registry) CMD=("$REGISTRY" serve "$LAB/cp/registry.yml") ;;
    dns) CMD=("$DNSMASQ" --keep-in-foreground --conf-file=/dev/null --pid-file= --user=root --no-resolv --no-hosts --bind-interfaces --listen-address="$API"
        --local=/cluster.local/ --no-negcache --local-ttl=5 --hostsdir="$LAB/cp/names" --log-facility=-) ;;
    names) CMD=("$SELF" __names) ;;
    containerd) CMD=(env PATH="$CONTAINERD_BIN:$PATH" "$CONTAINERD_BIN/containerd" --config /etc/containerd/config.toml) ;;
    kubelet) CMD=("$K8S_BIN/kubelet" --config="$LAB/$m/kubelet.yml" --kubeconfig="$k/$m.conf" --hostname-override="$m" --node-ip="$(ip_of "$m")"
        --container-runtime=remote --container-runtime-endpoint=unix:///run/containerd/containerd.sock --pod-infra-container-image="$PAUSE"
        ${LAB_KUBELET_ARGS:-}) ;;
    proxy) CMD=("$K8S_BIN/kube-proxy" --kubeconfig="$k/proxy.conf" --hostname-override="$m" --proxy-mode=iptables --cluster-cidr="$NET.0.0/16"
        --oom-score-adj=0 --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0s --conntrack-tcp-timeout-close-wait=0s) ;;
    # Enforces NetworkPolicies, and nothing else of what it can. Other chains are its own, but it takes INPUT, FORWARD and OUTPUT first.
    policy) CMD=("${KUBE_ROUTER:?names kube-router}" --kubeconfig="$k/admin.conf" --hostname-override="$m" --run-firewall=true --run-router=false
        --run-service-proxy=false --service-cluster-ip-range="$SVC_NET.0/24" --health-port=0
        --iptables-sync-period=10s) ;; # a pod that it was told of too early it sees again only by then: five minutes by default
    *) die "no service $2" ;;
  esac
}
svc() { # MACHINE VERB SERVICE
  local m=$1 s=$3 f=$LAB/$1/run/$3.pid i
  case $2 in
    start) command_of "$m" "$s"
      on "$m" sh -c 'f=$1; l=$2; shift 2; setsid sh -c "echo \$\$ > $f; exec \"\$@\"" sh "$@" < /dev/null >> $l 2>&1 &' sh "$f" "$LAB/$m/log/$s" "${CMD[@]}" ;;
    stop|kill) [ -s "$f" ] || return 0
      on "$m" sh -c 'kill -$1 $2 2>/dev/null; n=0; while kill -0 $2 2>/dev/null && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done' sh \
        "$([ "$2" = kill ] && echo 9 || echo 15)" "$(cat "$f")" || true
      rm -f "$f" ;;
    restart) svc "$m" stop "$s"; svc "$m" start "$s" ;;
    status) [ -s "$f" ] && on "$m" kill -0 "$(cat "$f")" 2>/dev/null && echo "$s runs" || { echo "$s is stopped"; return 1; } ;;
    *) die "start, stop, kill, restart or status" ;;
  esac
}
kc() { on cp "$K8S_BIN/kubectl" --kubeconfig="$LAB/pki/admin.conf" "$@"; }

# ---- certificates -----------------------------------------------------------------------------------------------------
cert() { # NAME SUBJECT [SAN]
  local k=$LAB/pki
  openssl req -newkey rsa:2048 -nodes -keyout "$k/$1.key" -out "$k/$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$k/$1.csr" -CA "$k/ca.crt" -CAkey "$k/ca.key" -CAcreateserial -days 30 -out "$k/$1.crt" 2>/dev/null \
    -extfile <(echo "extendedKeyUsage=clientAuth,serverAuth"; [ -z "${3:-}" ] || echo "subjectAltName=$3")
}
kubeconfig() { # NAME: a kubeconfig with that certificate
  local k=$LAB/pki
  cat > "$k/$1.conf" <<YML
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://$API:6443", certificate-authority: $k/ca.crt}}]
users: [{name: $1, user: {client-certificate: $k/$1.crt, client-key: $k/$1.key}}]
contexts: [{name: lab, context: {cluster: lab, user: $1}}]
current-context: lab
YML
}
certificates() {
  local k=$LAB/pki n
  mkdir -p "$k"
  openssl req -x509 -newkey rsa:2048 -nodes -keyout "$k/ca.key" -out "$k/ca.crt" -days 30 -subj "/CN=peili-cluster" 2>/dev/null
  openssl genrsa -out "$k/sa.key" 2048 2>/dev/null; openssl rsa -in "$k/sa.key" -pubout -out "$k/sa.pub" 2>/dev/null
  cert apiserver /CN=kube-apiserver "IP:$API,IP:$SVC_NET.1,IP:127.0.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
  cert admin /O=system:masters/CN=admin; kubeconfig admin
  cert controllers /CN=system:kube-controller-manager; kubeconfig controllers
  cert scheduler /CN=system:kube-scheduler; kubeconfig scheduler
  cert proxy /CN=system:kube-proxy; kubeconfig proxy
  for n in $(nodes); do cert "$n" "/O=system:nodes/CN=system:node:$n" "IP:$(ip_of "$n"),DNS:$n"; kubeconfig "$n"; done
}

hosts() { # MACHINE: images.lab is the registry on cp. Peili puts itself in front; containerd reads it at each pull.
  local d=$LAB/$1/fs-etc-containerd/certs.d/images.lab
  mkdir -p "$d"
  # (containerd 1.6 and 1.7 throw away a file that has `server` and no [host] table.)
  printf 'server = "http://%s"\n[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' "$REG" "$REG" > "$d/hosts.toml"
}

# ---- configuration of a node ------------------------------------------------------------------------------------------
configure_node() {
  local m=$1 i=${1#n} c=$LAB/$1/fs-etc-containerd
  mkdir -p "$c" "$LAB/$m/fs-etc-cni/net.d" "$LAB/$m/static"
  cat > "$c/config.toml" <<TOML
version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE"
  restrict_oom_score_adj = true    # without CAP_SYS_RESOURCE nobody may lower it
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$CNI_BIN"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "$RUNC"
TOML
  hosts "$m"
  cat > "$LAB/$m/fs-etc-cni/net.d/10-lab.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "lab", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$NET.$i.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
  cat > "$LAB/$m/kubelet.yml" <<YML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $LAB/pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $LAB/pki/$m.crt
tlsPrivateKeyFile: $LAB/pki/$m.key
cgroupDriver: cgroupfs
cgroupRoot: /
cgroupsPerQOS: true
enforceNodeAllocatable: [pods]
failSwapOn: false
nodeStatusUpdateFrequency: 4s
nodeStatusReportFrequency: 1m
staticPodPath: $LAB/$m/static
syncFrequency: 10s   # kubelet 1.20 acts on a failed startup probe only at its next sync: one minute by default
oomScoreAdj: 0
resolvConf: /etc/resolv.conf
clusterDomain: cluster.local
clusterDNS: [$DNS]
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
serializeImagePulls: false
YML
}
network() {
  local n i
  ip netns add "$PREFIX-cp"
  ip -n "$PREFIX-cp" link set lo up
  ip -n "$PREFIX-cp" link add br0 type bridge
  ip -n "$PREFIX-cp" addr add "$API/24" dev br0
  ip -n "$PREFIX-cp" link set br0 up
  for n in $(nodes); do
    i=${n#n}
    ip netns add "$PREFIX-$n"
    ip -n "$PREFIX-$n" link set lo up
    ip -n "$PREFIX-$n" link add eth0 type veth peer name "$n" netns "$PREFIX-cp"
    ip -n "$PREFIX-$n" addr add "$(ip_of "$n")/24" dev eth0
    ip -n "$PREFIX-cp" link set "$n" master br0 up
    ip -n "$PREFIX-$n" route add unreachable 169.254.0.0/16   # else kubelet waits 11 s for a cloud's metadata service
    ip -n "$PREFIX-cp" route add "$NET.$i.0/24" via "$(ip_of "$n")"
    link "$n" up
  done
}
link() { # MACHINE down|up: going down the kernel takes its routes away, and whoever manages the network sets them again
  local i
  ip -n "$PREFIX-$1" link set eth0 "$2"
  [ "$2" = up ] || return 0
  ip -n "$PREFIX-$1" route add default via "$API"
  for i in $(nodes); do [ "$1" = "$i" ] || ip -n "$PREFIX-$1" route add "$NET.${i#n}.0/24" via "$(ip_of "$i")"; done
}

# ---- names: a stand-in for cluster DNS ------------------------------------------------------------------------------------
# dnsmasq answers from a file, and this loop writes it anew from Services and Endpoints each second: a headless Service has
# the addresses of its Endpoints (not ready ones too where it publishes them), others have their cluster address. It has A
# records of Services, and no SRV, no PTR and no names of pods. Without the API server the last names stay, as in CoreDNS.
__names() {
  local f=$LAB/cp/names/cluster k=$LAB/pki s e
  local get=(curl -fsS -m 5 --cacert "$k/ca.crt" --cert "$k/admin.crt" --key "$k/admin.key")
  while sleep 1; do
    s=$("${get[@]}" "https://$API:6443/api/v1/services") && e=$("${get[@]}" "https://$API:6443/api/v1/endpoints") || continue
    jq -nr --argjson s "$s" --argjson e "$e" '($e.items | map({key: "\(.metadata.namespace)/\(.metadata.name)", value: .}) | from_entries) as $of
      | $s.items[] | "\(.metadata.name).\(.metadata.namespace).svc.cluster.local" as $name
      | (if .spec.clusterIP != "None" then [.spec.clusterIP]
         else .spec.publishNotReadyAddresses as $all | ($of["\(.metadata.namespace)/\(.metadata.name)"].subsets // [])
           | [.[] | (.addresses // [])[], (if $all then (.notReadyAddresses // [])[] else empty end) | .ip] end)
      | unique[] | "\(.) \($name)"' > "$LAB/cp/names.new" || continue
    # in one step: dnsmasq looks at each file that is moved into the folder
    cmp -s "$LAB/cp/names.new" "$f" || { cp "$LAB/cp/names.new" "$LAB/cp/names.next"; mv "$LAB/cp/names.next" "$f"; }
  done
}
dns_service() {
  kc apply -f - <<YML
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: $DNS, ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]}
---
apiVersion: v1
kind: Endpoints
metadata: {name: kube-dns, namespace: kube-system}
subsets: [{addresses: [{ip: $API}], ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]}]
YML
}

# ---- images -------------------------------------------------------------------------------------------------------------
image() { # NAME:TAG ROOTFS CONFIG_JSON [import]
  local name=${1%:*} tag=${1##*:} dir=$2 cfg=$3 t m l c n
  t=$(mktemp -d "$LAB/image.XXXXXX"); mkdir -p "$t/blobs/sha256"
  tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$dir" -cf "$t/layer" .
  l=$(sha256sum "$t/layer" | cut -d' ' -f1)
  jq -nc --argjson c "$cfg" --arg d "sha256:$l" --arg a "$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')" '{architecture:$a,os:"linux",config:$c,rootfs:{type:"layers",diff_ids:[$d]}}' > "$t/config"
  c=$(sha256sum "$t/config" | cut -d' ' -f1)
  jq -nc --arg c "sha256:$c" --arg l "sha256:$l" --argjson cs "$(stat -c %s "$t/config")" --argjson ls "$(stat -c %s "$t/layer")" '{schemaVersion:2,
    mediaType:"application/vnd.oci.image.manifest.v1+json",config:{mediaType:"application/vnd.oci.image.config.v1+json",digest:$c,size:$cs},
    layers:[{mediaType:"application/vnd.oci.image.layer.v1.tar",digest:$l,size:$ls}]}' > "$t/manifest"
  m=$(sha256sum "$t/manifest" | cut -d' ' -f1)
  if [ "${4:-}" = import ]; then
    mv "$t/layer" "$t/blobs/sha256/$l"; mv "$t/config" "$t/blobs/sha256/$c"; cp "$t/manifest" "$t/blobs/sha256/$m"
    echo '{"imageLayoutVersion":"1.0.0"}' > "$t/oci-layout"
    jq -nc --arg d "sha256:$m" --argjson s "$(stat -c %s "$t/manifest")" --arg n "$name:$tag" '{schemaVersion:2,manifests:[{mediaType:
      "application/vnd.oci.image.manifest.v1+json",digest:$d,size:$s,annotations:{"io.containerd.image.name":$n,"org.opencontainers.image.ref.name":$n}}]}' > "$t/index.json"
    tar -C "$t" -cf "$t/image.tar" oci-layout index.json blobs
    for n in $(nodes); do on "$n" "$CONTAINERD_BIN/ctr" -n k8s.io images import "$t/image.tar" >/dev/null; done
  else
    name=${name#images.lab/}
    for n in config layer; do
      local d u; d=$([ $n = config ] && echo "$c" || echo "$l")
      u=$(on cp curl -fsS -X POST -D - -o /dev/null "http://$REG/v2/$name/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
      on cp curl -fsS -X PUT -H 'Content-Type: application/octet-stream' --data-binary "@$t/$n" "$u&digest=sha256:$d" -o /dev/null
    done
    on cp curl -fsS -X PUT -H 'Content-Type: application/vnd.oci.image.manifest.v1+json' --data-binary "@$t/manifest" "http://$REG/v2/$name/manifests/$tag" -o /dev/null
  fi
  rm -rf "$t"; echo "sha256:$m"
}
load() { # ARCHIVE NAME:TAG
  local n t
  t=$(mktemp -d "$LAB/load.XXXXXX")
  tar -C "$t" -xf "$1"
  # By the name that was asked for alone. (One without a host, like `peili:0.1.0`, would make CRI find the image by no name: NOTES.md.)
  jq -c --arg n "$2" '.manifests |= [.[0] | .annotations = {"io.containerd.image.name": $n}]' "$t/index.json" > "$t/index.new"
  mv "$t/index.new" "$t/index.json"
  tar -C "$t" -cf "$t.tar" .
  for n in $(nodes); do on "$n" "$CONTAINERD_BIN/ctr" -n k8s.io images import "$t.tar" > /dev/null; done
  rm -rf "$t" "$t.tar"
}

check() { # prints what is missing; 0 if nothing is
  local v p missing=()
  [ "$(id -u)" = 0 ] || missing+=(root)
  [ -d /sys/fs/cgroup/memory ] || missing+=("cgroup v1 (kubelet 1.20)")
  for p in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do [ -x "${K8S_BIN:-/nowhere}/$p" ] || missing+=("$p"); done
  for p in containerd containerd-shim-runc-v2 ctr; do [ -x "${CONTAINERD_BIN:-/nowhere}/$p" ] || missing+=("$p"); done
  for p in bridge host-local loopback portmap; do [ -x "${CNI_BIN:-/nowhere}/$p" ] || missing+=("cni/$p"); done
  for p in "${ETCD:-etcd}" "${RUNC:-runc}" "${REGISTRY:-docker-registry}" "$DNSMASQ" ip iptables nsenter openssl jq curl cc; do
    command -v "$p" >/dev/null || missing+=("${p##*/}")
  done
  [ ${#missing[@]} = 0 ] || { (IFS=,; echo "missing: ${missing[*]}"); return 3; }
}

# ---- the cluster ----------------------------------------------------------------------------------------------------------
start_node() {
  boot "$1"
  ip -n "$PREFIX-cp" link set "$1" up
  svc "$1" start containerd
  wait_for 20 "containerd on $1" on "$1" "$CONTAINERD_BIN/ctr" version
  svc "$1" start kubelet; svc "$1" start proxy
}
up() {
  need K8S_BIN CONTAINERD_BIN
  check || exit 3
  [ ! -e "$LAB/cp/pid" ] || die "already up in $LAB"
  local t0=$SECONDS n
  mkdir -p "$LAB/cp/names" "$LAB/pause.root"
  for n in K8S_BIN CONTAINERD_BIN KUBE_ROUTER ETCD CNI_BIN RUNC REGISTRY DNSMASQ ${!LAB_*}; do printf '%s=%q\n' "$n" "${!n:-}"; done > "$LAB/env"
  cc -Os -static -s -xc -o "$LAB/pause" - <<'C'
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void reap(int s) { (void)s; while (waitpid(-1, 0, WNOHANG) > 0) ; }
static void end(int s) { (void)s; _exit(0); }
int main(void) { signal(SIGCHLD, reap); signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }
C
  cp "$LAB/pause" "$LAB/pause.root/pause"
  [ -e "$LAB/pki/ca.crt" ] || certificates
  network
  printf 'version: 0.1\nlog: {level: info}\nstorage: {filesystem: {rootdirectory: %s}, delete: {enabled: true}}\nhttp: {addr: "%s"}\n' \
    "$LAB/cp/registry" "$REG" > "$LAB/cp/registry.yml"
  boot cp
  svc cp start etcd; svc cp start registry; svc cp start apiserver
  wait_for 90 "the API server" kc get --raw /readyz
  svc cp start controllers; svc cp start scheduler
  svc cp start dns; svc cp start names
  dns_service >/dev/null
  echo "control plane ready after $((SECONDS - t0)) s"
  for n in $(nodes); do configure_node "$n"; start_node "$n"; done
  image "$PAUSE" "$LAB/pause.root" '{"Entrypoint":["/pause"]}' import >/dev/null
  for n in $(nodes); do wait_for 60 "$n to register" kc get node "$n"; done
  kc wait --for=condition=Ready node --all --timeout=120s
  echo "$NODES nodes ready after $((SECONDS - t0)) s; kubeconfig $LAB/pki/admin.conf, in network namespace $PREFIX-cp"
}
down() {
  local m
  freeze THAWED 2>/dev/null || true
  for m in $(nodes) cp; do [ ! -d "$LAB/$m" ] || power_off "$m"; done
  for m in $(nodes) cp; do [ ! -e "/run/netns/$PREFIX-$m" ] || ip netns del "$PREFIX-$m"; done
  ! grep -q " $LAB/" /proc/self/mountinfo || die "mounts left below $LAB"
  [ -n "${LAB_KEEP:-}" ] || rm -rf "$LAB"
}
rule() { # N drop|reject MATCH...
  local n=$1 how=$2; shift 2
  local j=(-j DROP); [ "$how" = reject ] && j=(-j REJECT --reject-with tcp-reset)
  # after DNAT of the service address a packet carries the API server's own, in OUTPUT and in FORWARD alike
  on "$n" iptables -w -I "$@" -d "$API" -p tcp --dport 6443 -m comment --comment lab-block "${j[@]}"
}
rule_service() { # N: by what the connection was for before kube-proxy turned it; kubelet and kube-proxy use the server's own address
  local c
  for c in OUTPUT FORWARD; do
    on "$1" iptables -w -I $c -m conntrack --ctorigdst "$SVC_NET.1" --ctproto tcp -m comment --comment lab-block -j DROP
  done
}
blocked() { on "$1" iptables -w -nvxL | awk '/lab-block/ {p += $1; b += $2} END {print p + 0, b + 0}'; }
unblock() {
  local c r
  for c in OUTPUT FORWARD; do
    on "$1" iptables -w -S $c | grep lab-block | sed 's/^-A/-D/' | while read -r r; do eval "on $1 iptables -w $r"; done || true
  done
}
memory() {
  local m f
  for m in cp $(nodes); do
    for f in $(find "$(grep /memory/ "$LAB/$m/cgroups")" -name cgroup.procs -exec cat {} +); do
      awk -v m="$m" '/^Name/{n=$2} /^VmRSS/{print m, n, $2}' "/proc/$f/status" 2>/dev/null || true
    done
  done | awk '{a[$1" "$2]+=$3; t+=$3} END {for (k in a) printf "%8.0f MiB  %s\n", a[k]/1024, k; printf "%8.0f MiB  all\n", t/1024}' | sort -k3
}

SELF=$(readlink -f "$0"); export LAB
if [ "${1:-}" != __init ] && [ -f "$LAB/env" ]; then
  # It is run as root, and the folder may be one that others can make.
  [ -O "$LAB/env" ] || die "$LAB/env is somebody else's"
  set -a; . "$LAB/env"; set +a; NODES=${LAB_NODES:-3}; PREFIX=${LAB_PREFIX:-pc}; NET=${LAB_NET:-10.97}; API=$NET.0.1; REG=$API:5000; fi
case ${1:-} in
  up|down|check|memory|image|load|blocked|unblock|link|hosts|svc|on|__init|__names) "$@" ;;
  block-service) rule_service "$2" ;;
  kubectl) shift; kc "$@" ;;
  pause) freeze FROZEN ;;
  resume) freeze THAWED ;;
  block) rule "$2" "$3" OUTPUT ${4:+-m owner --uid-owner "$4"} ;;
  block-pod) rule "$2" "$4" FORWARD -s "$3" ;;
  power-off) power_off "$2" ;;
  power-on) start_node "$2" ;;
  *) sed -n '2,/^set -e/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
