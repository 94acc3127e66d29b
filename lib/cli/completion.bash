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
{{#asked}}
    --{{name}}) COMPREPLY=($(compgen -W "$(${COMP_WORDS[0]} completion --values {{kind}} 2>/dev/null)" -- "$cur")); return ;;
{{/asked}}
    {{others}}) return ;;
  esac
  case ${COMP_WORDS[1]} in
{{#commands}}
    {{command}}) words="{{#words}}{{words}} {{/words}}{{#options}}--{{name}} {{/options}}--help"{{#kind}}
      [[ $cur == -* ]] || words=$(${COMP_WORDS[0]} completion --values {{kind}} 2>/dev/null){{/kind}} ;;
{{/commands}}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _genie genie
