{{/* An image with its tag, and its digest if there is one. */}}
{{- define "leadrelay.image" -}}
{{ .repository }}:{{ .tag }}{{ with .digest }}@{{ . }}{{ end }}
{{- end }}

{{/* The version for the name of the migration's job, which is immutable: each version has a job of its own. */}}
{{- define "leadrelay.version" -}}
{{ regexReplaceAll "[^a-z0-9]+" (lower .Values.image.tag) "-" | trimAll "-" }}
{{- end }}

{{/* A value of an environment variable. Helm reads whole numbers as floats, and would write large ones with an exponent. */}}
{{- define "leadrelay.quote" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . | quote }}{{ else }}{{ . | quote }}{{ end }}
{{- end }}

{{/* Settings beside those that the templates name. */}}
{{- define "leadrelay.settings" }}
{{- range $key, $value := . }}
{{ $key }}: {{ include "leadrelay.quote" $value }}
{{- end }}
{{- end }}

{{/* Networks for a network policy. */}}
{{- define "leadrelay.blocks" -}}
{{- $blocks := list }}
{{- range . }}{{ $blocks = append $blocks (dict "ipBlock" (dict "cidr" .)) }}{{ end }}
{{- toJson $blocks }}
{{- end }}
