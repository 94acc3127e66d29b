# bash completion of genie: . <(genie completion bash)
_genie() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{{#commands}}{{command}} {{/commands}}" -- "$cur"))
    return
  fi
  case $prev in
    {{paths}})
      compopt -o filenames 2>/dev/null
      COMPREPLY=($(compgen -f -- "$cur"))
      return ;;
{{#choices}}
    --{{name}}) COMPREPLY=($(compgen -W "{{few}}" -- "$cur")); return ;;
{{/choices}}
    {{others}}) return ;;
  esac
  case ${COMP_WORDS[1]} in
{{#commands}}
    {{command}}) words="{{#words}}{{words}} {{/words}}{{#options}}--{{name}} {{/options}}--help" ;;
{{/commands}}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _genie genie
