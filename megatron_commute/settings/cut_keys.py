"""Keys and laws of a mixture file that earlier versions had: what an error says of them."""

from collections.abc import Mapping

from megatron_commute.settings.yaml_checks import Document

CUT_SINCE = "0.2.0"
CUT = {  # keys that no version since then reads -> what to write instead
    "response": "remove the key, order effects are not measured in a run any more",
    "controller.end": "write the end of the run into a schedule: FILE, mode: fixed, and remove the key here",
    "controller.gate": "remove the key, no law that is left predicts its gain",
    "controller.harm": "write it to the command, design --harm, and remove the key here",
    "probe.direction": "remove the key, probes of a run are local; "
    "code that measures offline hands a direction over",
}
CUT_LAWS = {  # laws that no version since then knows -> why
    "receding": "it plans on a model that no running job keeps",
    "response": "lock-in, which it needs, had 5 of 14 signs right",
    "finish": "it gained 0.3 % at best",
}


def refuse_cut(document: Document) -> None:
    """Raises ConfigError for a key or a law that earlier versions had."""
    for key, cure in CUT.items():
        section, _, name = key.rpartition(".")
        holder = document.tree.get(section) if section else document.tree
        if isinstance(holder, Mapping) and name in holder:
            raise document.error(key, f"was cut in {CUT_SINCE}", cure)
    chosen = document.tree.get("controller")
    if not isinstance(chosen, Mapping):
        return
    named = [("law", chosen.get("law"), "write flow or hold")]
    if isinstance(chosen.get("compare"), list):
        named += [("compare", law, "leave it out") for law in chosen["compare"]]
    for key, law, cure in named:
        if isinstance(law, str) and law in CUT_LAWS:
            raise document.error(f"controller.{key}", f"{law} was cut in {CUT_SINCE} ({CUT_LAWS[law]})", cure)
