#compdef genie
# zsh completion of genie: genie completion zsh > "${fpath[1]}/_genie"
_genie_values() { compadd -- ${(f)"$(genie completion --values $1 2>/dev/null)"} }
_genie() {
  local -a commands
  commands=(
{{#commands}}
    '{{command}}:{{summary}}'
{{/commands}}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{{#commands}}
    {{command}})
      _arguments \
{{#options}}
        '{{#value}}*{{/value}}--{{name}}[{{meaning}}]{{#value}}:{{name}}:{{#few}}({{few}}){{/few}}{{#kind}}{_genie_values {{kind}}}{{/kind}}{{#isPath}}_files{{/isPath}}{{/value}}' \
{{/options}}
{{#kind}}
        '*:{{kind}}:{_genie_values {{kind}}}' \
{{/kind}}
{{#words}}
        '1:word:({{words}})' \
{{/words}}
        '--help[show the options]'
      ;;
{{/commands}}
  esac
}
if [[ $funcstack[1] == _genie ]]; then _genie "$@"; else compdef _genie genie; fi
