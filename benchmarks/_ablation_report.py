def summary(rows, known):
    return {
        r["arm"]: {
            "edit": {
                k: sum(x for x in v if x is not None) / max(1, len([x for x in v if x is not None]))
                for k, v in r.get("items", {}).get("edit", {}).items()
            }
        }
        for r in rows
    }


def text(rows, known, protocol):
    return repr(summary(rows, known))
