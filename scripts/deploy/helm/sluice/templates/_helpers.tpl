{{- define "sluice.labels" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}
{{- define "sluice.replaces" -}}
{{- if eq .Values.mode "kube-proxy-replacement" }}yes{{ end -}}
{{- end -}}
{{- define "sluice.beside" -}}
{{- if eq .Values.mode "beside-kube-proxy" }}yes{{ end -}}
{{- end -}}
