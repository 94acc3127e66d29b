# fish completion of genie: genie completion fish | source
complete -c genie -f
{{#commands}}
complete -c genie -n __fish_use_subcommand -a {{command}} -d '{{summary}}'
{{#words}}
complete -c genie -n '__fish_seen_subcommand_from {{command}}' -a '{{words}}'
{{/words}}
{{#options}}
complete -c genie -n '__fish_seen_subcommand_from {{command}}' -l {{name}}{{#few}} -x -a '{{few}}'{{/few}}{{#isPath}} -r -F{{/isPath}}{{#isOther}} -x{{/isOther}} -d '{{meaning}}'
{{/options}}
{{/commands}}
