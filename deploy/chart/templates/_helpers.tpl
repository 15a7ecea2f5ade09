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

{{/* Metadata of an object that has the release's name. */}}
{{- define "peili.metadata" -}}
name: {{ include "peili.name" . }}
namespace: {{ .Release.Namespace }}
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
{{- range $name, $pair := dict
  "mode" (list .Values.mode "host pod")
  "rbac.lease" (list .Values.rbac.lease "create precreated none")
  "election.backend" (list .Values.election.backend "auto lease configmap gossip off")
  "election.configmap.hold" (list .Values.election.configmap.hold "sole both observe") -}}
{{- if not (has (first $pair) (splitList " " (last $pair))) -}}
{{- fail (printf "%s is `%v`: say one of %s" $name (first $pair) (last $pair)) -}}
{{- end -}}
{{- end -}}
{{- if and $values.clusterKey.existingSecret $values.clusterKey.value -}}
{{- fail "clusterKey.existingSecret and clusterKey.value: give one of them" -}}
{{- end -}}
{{- if not (or (include "peili.secret" .) $values.clusterKey.allowOpen) -}}
{{- fail "no cluster key: whoever reaches the ports could give and get content. Make one with `peili cluster-key generate FILE`, and give it as clusterKey.value, or its Secret as clusterKey.existingSecret; or say clusterKey.allowOpen=true" -}}
{{- end -}}
{{- if and (eq $values.rbac.lease "create") (eq .Release.Namespace "kube-system") (include "peili.strict" .) -}}
{{- fail "rbac.lease=create in kube-system: the pods could create any ConfigMap there. Install into a namespace of its own (deploy/manifests/namespace.yaml), or say rbac.lease=precreated" -}}
{{- end -}}
{{- if and (eq $values.rbac.lease "none") (include "peili.strict" .) -}}
{{- fail (printf "rbac.lease=none with election.backend=%s, which asks the API server: say election.backend=gossip" $values.election.backend) -}}
{{- end -}}
{{- if and $values.runtime.configure (not $values.runtime.configFolder) -}}
{{- fail "runtime.configure without runtime.configFolder: name containerd's folder, or say runtime.configure=false" -}}
{{- end -}}
{{- end -}}

{{/* What a container may: nothing but what root owns. */}}
{{- define "peili.confined" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
