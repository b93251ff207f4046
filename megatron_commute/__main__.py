from megatron_commute.cli import main

main()
