{{- define "peili.name" -}}
{{- .Values.name | default .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "peili.selector" -}}
app.kubernetes.io/name: peili
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "peili.labels" -}}
{{ include "peili.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* Labels by which the pods of the mirror are found: the clean-up's have others. */}}
{{- define "peili.mirror" -}}
{{ include "peili.selector" . }}
app.kubernetes.io/component: mirror
{{- end -}}

{{/* Metadata of an object that has the release's name. */}}
{{- define "peili.metadata" -}}
name: {{ include "peili.name" . | quote }}
namespace: {{ .Release.Namespace | quote }}
labels:
  {{- include "peili.labels" . | nindent 2 }}
{{- end -}}

{{- define "peili.image" -}}
{{- $image := .Values.image -}}
{{- if not $image.repository -}}
{{- fail "image.repository is empty: no image of Peili is published yet, name your own" -}}
{{- end -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else if not $image.tag -}}
{{- fail "neither image.digest nor image.tag: name one, best the digest" -}}
{{- else if eq $image.tag "latest" -}}
{{- fail "image.tag is `latest`, which nodes would have at different versions: name a version or a digest" -}}
{{- else -}}
{{ $image.repository }}:{{ $image.tag }}
{{- end -}}
{{- end -}}

{{/* Not empty: this backend asks the API server. */}}
{{- define "peili.strict" -}}
{{- if has .Values.election.backend (list "auto" "lease" "configmap") }}yes{{ end -}}
{{- end -}}

{{/* Not empty: the pods have a token. */}}
{{- define "peili.token" -}}
{{- if or (ne .Values.rbac.lease "none") .Values.rbac.readNode }}yes{{ end -}}
{{- end -}}

{{/* Not empty: there is a Lease. */}}
{{- define "peili.hasLease" -}}
{{- $election := .Values.election -}}
{{- if and (include "peili.strict" .) (not (and (eq $election.backend "configmap") (eq $election.configmap.hold "sole"))) }}yes{{ end -}}
{{- end -}}

{{- define "peili.lock" -}}
{{- .Values.election.configmap.name | default .Values.election.lease -}}
{{- end -}}

{{- define "peili.secret" -}}
{{- if .Values.clusterKey.existingSecret }}{{ .Values.clusterKey.existingSecret }}
{{- else if .Values.clusterKey.value }}{{ include "peili.name" . }}-cluster-key
{{- end -}}
{{- end -}}

{{/* What cannot be, with what to do instead. */}}
{{- define "peili.check" -}}
{{- $values := .Values -}}
{{- if and $values.clusterKey.existingSecret $values.clusterKey.value -}}
{{- fail "clusterKey.existingSecret and clusterKey.value: give one of them" -}}
{{- end -}}
{{- if not (or (include "peili.secret" .) $values.clusterKey.allowOpen) -}}
{{- fail "no cluster key: whoever reaches the ports could give and get content. Make one with `peili cluster-key generate FILE`, and give it as clusterKey.value, or its Secret as clusterKey.existingSecret; or say clusterKey.allowOpen=true" -}}
{{- end -}}
{{- if and (eq $values.rbac.lease "create") (eq .Release.Namespace "kube-system") (include "peili.strict" .) -}}
{{- fail "rbac.lease=create in kube-system: the pods could create any Lease there. Install into a namespace of its own (deploy/manifests/namespace.yaml), or say rbac.lease=precreated" -}}
{{- end -}}
{{- if and (eq $values.rbac.lease "none") (include "peili.strict" .) -}}
{{- fail (printf "rbac.lease=none with election.backend=%s, which asks the API server: say election.backend=gossip" $values.election.backend) -}}
{{- end -}}
{{- if and $values.podMonitor.enabled (not $values.metrics.expose) -}}
{{- fail "podMonitor.enabled: metrics are for the node alone, and Prometheus does not reach them. Say metrics.expose=true, and who may reach the admin port by a firewall or a policy" -}}
{{- end -}}
{{- if and $values.prometheusRule.enabled (not $values.metrics.expose) -}}
{{- fail "prometheusRule.enabled: without metrics that Prometheus reaches its alert PeiliAbsent would never end. Say metrics.expose=true" -}}
{{- end -}}
{{- if and $values.runtime.configure (not $values.runtime.configFolder) -}}
{{- fail "runtime.configure without runtime.configFolder: name containerd's folder, or say runtime.configure=false" -}}
{{- end -}}
{{- if and $values.runtime.configure (not (hasPrefix (printf "%s/" $values.runtime.configFolder) $values.runtime.hostsFolder)) -}}
{{- fail (printf "runtime.hostsFolder is %s, outside of runtime.configFolder %s, in which alone `configure` writes: name a folder that holds both, or say runtime.configure=false" $values.runtime.hostsFolder $values.runtime.configFolder) -}}
{{- end -}}
{{- range $key, $value := dict "admin.listen" "ports.admin, metrics.expose and networkMode" "admin.clients" "metrics.expose and networkMode" "registry.listen" "ports.registry and networkMode" "registry.clients" "networkMode" "network.listen" "ports.control" "transfer.listen" "ports.peer" "node.data-dir" "dataFolder" "upstream.hosts-dirs" "runtime.hostsFolder" "store.socket" "runtime.socket" "store.content-root" "runtime.contentRoot" "election.backend" "election.backend" "network.cluster-key" "clusterKey" "policies.registry" "policies.registry" "policies.trust" "policies.trust" "policies.election" "policies.election" -}}
{{- $path := splitList "." $key -}}
{{- if hasKey (get $values.config (first $path) | default dict) (last $path) -}}
{{- fail (printf "config.%s: the chart sets it, and what else goes by it: say %s" $key $value) -}}
{{- end -}}
{{- end -}}
{{- if hasKey ((get $values.config "election" | default dict).lease | default dict) "name" -}}
{{- fail "config.election.lease.name: the rights go by it, too: say election.lease" -}}
{{- end -}}
{{- if and (eq $values.networkMode "pod") $values.ciliumHostFirewall.enabled -}}
{{- fail "ciliumHostFirewall.enabled with networkMode=pod: its rules are about nodes. Say networkPolicy.kind=cilium" -}}
{{- end -}}
{{- if and (eq $values.networkMode "host") (ne $values.networkPolicy.kind "none") -}}
{{- fail (printf "networkPolicy.kind=%s with networkMode=host: no such policy counts for pods with host networking. Say ciliumHostFirewall.enabled=true, or open the ports in the nodes' firewall" $values.networkPolicy.kind) -}}
{{- end -}}
{{- if and (ge (int $values.ports.registry) 30000) (le (int $values.ports.registry) 32767) -}}
{{- fail (printf "ports.registry=%d is a NodePort (30000 to 32767), which kube-proxy may take: choose another" (int $values.ports.registry)) -}}
{{- end -}}
{{- $ports := list -}}
{{- range $port := $values.ports -}}
{{- $ports = append $ports (int $port) -}}
{{- end -}}
{{- if lt (len (uniq $ports)) (len $ports) -}}
{{- fail "ports: two of them are the same" -}}
{{- end -}}
{{- end -}}

{{/* Not empty: `configure` writes, so that there is something to take out again. */}}
{{- define "peili.cleans" -}}
{{- if and .Values.runtime.configure .Values.runtime.cleanup.enabled }}yes{{ end -}}
{{- end -}}

{{/* What a container may: nothing but what root owns. */}}
{{- define "peili.confined" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What each pod is: in which network, root, no more rights than that. */}}
{{- define "peili.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- if eq .Values.networkMode "host" }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .Values.nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  # containerd's socket, content and configuration are root's.
  runAsUser: 0
  runAsGroup: 0
  seccompProfile:
    type: RuntimeDefault
  {{- with .Values.seLinuxOptions }}
  seLinuxOptions:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "peili.tolerations" -}}
{{- with .Values.tolerations -}}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A token of ten minutes, which kubelet renews, and what belongs to it. */}}
{{- define "peili.projected" -}}
projected:
  sources:
    - serviceAccountToken: {path: token, expirationSeconds: 600}
    - configMap:
        name: kube-root-ca.crt
        items: [{key: ca.crt, path: ca.crt}]
    - downwardAPI:
        items:
          - path: namespace
            fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}
{{- end -}}

{{/* A container that takes Peili out of the node's files. Its arguments stand last. */}}
{{- define "peili.cleaner" -}}
image: {{ include "peili.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- include "peili.confined" . | nindent 2 }}
resources:
  requests: {cpu: 10m, memory: 32Mi}
  limits: {memory: 128Mi}
volumeMounts:
  - {name: data, mountPath: {{ .Values.dataFolder }}}
  - {name: runtime-config, mountPath: /host{{ .Values.runtime.configFolder }}}
args:
  - cleanup
  - --root=/host
  - --data-dir={{ .Values.dataFolder }}
  - --config-path={{ .Values.runtime.hostsFolder }}
  - --mirror=http://127.0.0.1:{{ .Values.ports.registry }}
{{- end -}}

{{/* Metadata of what runs before a release is deleted: the root, and the hook's weight. */}}
{{- define "peili.hook" -}}
{{- $root := first . -}}
name: {{ printf "%s-cleanup" (include "peili.name" $root) | quote }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "peili.labels" $root | nindent 2 }}
annotations:
  helm.sh/hook: pre-delete
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
  helm.sh/hook-weight: {{ last . | quote }}
{{- end -}}
