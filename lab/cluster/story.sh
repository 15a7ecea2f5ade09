#!/usr/bin/env bash
# Stories on a real cluster: lab.sh brings one up, the chart is deployed, each act is played on it, the chart is removed.
#
#   story.sh [seed] [faults] [pods]     these acts; all, if none is named
#
# seed: a mirror whose API server is taken away goes on, and says why; one whose probe waits for a leader is killed by kubelet.
# pods: the same mirror in networks of its pods' own, and NetworkPolicies.
# faults: what else fails or comes late: an update, the API server, a node, its network, containerd, DNS, the Lease, the folder of hosts.
#
# Given by the environment:
#   K8S_BIN CONTAINERD_BIN ...   as for lab.sh, with all of LAB_*
#   IMAGE            OCI archive with Peili's image (`cargo xtask image` makes it)
#   HELM, CHART      helm (default: from PATH), and the chart (default: deploy/chart of this project)
#   KUBE_ROUTER      kube-router, for the act pods
#   PROMETHEUS       prometheus (default: from PATH): it scrapes by the chart's PodMonitor
#   STORY_LOG        folder for logs, kept (default: none are kept unless a step fails; then it says where)
#   STORY_VALUES     file with further values of the chart
#   STORY_KEEP=      not empty: leave the cluster up
#   SEED_HOLD=60     seconds for which the mirror has no API server, in each of the seed's two ways
# Prints one line for each step, `ok STEP (SECONDS s): WHAT WAS SEEN`, and ends with 0 if all held; 1: `FAILED STEP: WHY`; 3: something
# is missing, said in one line, and nothing was run.
set -Eeuo pipefail
ACTS=(seed faults pods); [ $# = 0 ] || ACTS=("$@")
for act in "${ACTS[@]}"; do [[ $act =~ ^(seed|faults|pods)$ ]] || { echo "no act $act: seed, faults, pods"; exit 2; }; done
. "$(dirname "$(readlink -f "$0")")/steps.sh"
"$HERE/lab.sh" check || exit 3
[ -f "${IMAGE:-}" ] || missing "IMAGE, an archive of Peili's image"
command -v "$HELM" > /dev/null || missing helm
if [[ " ${ACTS[*]} " = *" pods "* ]]; then command -v "${KUBE_ROUTER:-}" > /dev/null || missing KUBE_ROUTER; command -v ipset > /dev/null || missing ipset; fi
command -v "$PROMETHEUS" > /dev/null || [[ " ${ACTS[*]} " != *" seed "* ]] || missing prometheus

begin
for act in "${ACTS[@]}"; do . "$HERE/$act.sh"; done
removed
echo "all held, $SECONDS s in all"
