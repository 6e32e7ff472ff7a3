#!/usr/bin/env bash
# Runs on a multi-host TPU slice on Google Cloud: the same command on every host.
#
#   TPU=NAME ZONE=ZONE bash launch/tpu_pod.sh setup                        clone and install on every host
#   TPU=NAME ZONE=ZONE BUCKET=gs://NAME/DIR bash launch/tpu_pod.sh run     configs/hh_llama2_7b.yaml on v5p-8 chips
#   TPU=NAME ZONE=ZONE BUCKET=gs://NAME/DIR bash launch/tpu_pod.sh run CONFIG PRESET [key=value ...]
#
# Edit or set: TPU, ZONE; REPOSITORY (cloned by the hosts); BUCKET, which keeps everything (the hosts' service account
# needs write access), or WORKDIR, a folder that all hosts share (Filestore or other NFS). HF_TOKEN is passed on if set,
# as a file that only you can read, ~/.mpo_hf_token of each host.
# After a preemption, create the slice again, then call setup and run again.
set -euo pipefail
: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"

everywhere() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

action=${1:-}
[ $# -eq 0 ] || shift
case $action in
  setup)
    : "${REPOSITORY:?set REPOSITORY to the git address of this project}"
    everywhere "[ -d mpo_jax ] || git clone $(printf %q "$REPOSITORY") mpo_jax; cd mpo_jax && bash launch/setup.sh tpu bucket"
    ;;
  run)
    [ -n "${BUCKET:-}${WORKDIR:-}" ] || { echo "set BUCKET=gs://NAME/DIR, or WORKDIR to a folder that all hosts share" >&2; exit 2; }
    place=(workdir="${WORKDIR:-runs/tpu}")
    [ -z "${BUCKET:-}" ] || place+=(runtime.bucket="$BUCKET")
    [ $# -gt 0 ] || set -- configs/hh_llama2_7b.yaml configs/presets/tpu_v5p_8.yaml
    token=
    if [ -n "${HF_TOKEN:-}" ]; then
      # no part of the command, which gcloud logs and every user of a host can list
      file=$(mktemp)
      trap 'rm -f "$file"' EXIT
      printf %s "$HF_TOKEN" >"$file"
      gcloud compute tpus tpu-vm scp "$file" "$TPU:.mpo_hf_token" --zone="$ZONE" --worker=all
      token="HF_TOKEN=\"\$(cat ~/.mpo_hf_token)\""
    fi
    everywhere "cd mpo_jax && $token .venv/bin/mpo run $(printf '%q ' "$@") \
runtime.flags=recommended $(printf '%q ' "${place[@]}")"
    ;;
  *)
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
