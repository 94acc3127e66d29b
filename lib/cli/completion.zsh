#compdef genie
# zsh completion of genie: genie completion zsh > "${fpath[1]}/_genie"
_genie() {
  local -a commands
  commands=(
@commands@
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
@arguments@
  esac
}
if [[ $funcstack[1] == _genie ]]; then _genie "$@"; else compdef _genie genie; fi
