from megatron_commute.cli.main import main

main()
