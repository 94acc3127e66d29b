# fish completion of genie: genie completion fish | source
complete -c genie -f
{{#commands}}
complete -c genie -n __fish_use_subcommand -a {{command}} -d '{{summary}}'
{{#words}}
complete -c genie -n '__fish_seen_subcommand_from {{command}}' -a '{{words}}'
{{/words}}
{{#kind}}
complete -c genie -n '__fish_seen_subcommand_from {{command}}' -a '(genie completion --values {{kind}} 2>/dev/null)'
{{/kind}}
{{#options}}
complete -c genie -n '__fish_seen_subcommand_from {{command}}' -l {{name}}{{#few}} -x -a '{{few}}'{{/few}}{{#kind}} -x -a '(genie completion --values {{kind}} 2>/dev/null)'{{/kind}}{{#isPath}} -r -F{{/isPath}}{{#isOther}} -x{{/isOther}} -d '{{meaning}}'
{{/options}}
{{/commands}}
