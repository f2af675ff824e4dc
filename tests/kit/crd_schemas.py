"""Schemas of the custom resources that our manifests use, written by hand.

A checked subset: the fields that we set, closed to others, so that a misspelt one fails. The
controllers know more fields than these, and are the last word on what they mean.
"""

from typing import Any

Schema = dict[str, Any]


def _closed(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these members and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _resource(group: str, kind: str, spec: Schema) -> Schema:
    return _closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": group},
        kind={"const": kind},
        metadata=_closed(
            ("name",), name=_TEXT, namespace=_TEXT, labels={"type": "object"}, annotations=_TEXTS
        ),
        spec=spec,
    )


_TEXT: Schema = {"type": "string", "minLength": 1}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
_COUNT: Schema = {"type": "integer", "minimum": 0}

_TRIGGER = _closed(
    ("type", "metadata"),
    type={"const": "prometheus"},
    metricType={"enum": ["AverageValue", "Value"]},
    metadata=_closed(
        ("serverAddress", "query", "threshold"),
        serverAddress=_TEXT,
        query=_TEXT,
        # KEDA takes numbers as text.
        threshold={"type": "string", "pattern": r"^[0-9.]+$"},
        ignoreNullValues={"enum": ["true", "false"]},
    ),
)
_BEHAVIOUR = _closed(
    stabilizationWindowSeconds=_COUNT,
    policies={
        "type": "array",
        "items": _closed(
            ("type", "value", "periodSeconds"),
            type={"enum": ["Pods", "Percent"]},
            value=_COUNT,
            periodSeconds=_COUNT,
        ),
    },
)
_SCALED_OBJECT = _closed(
    ("scaleTargetRef", "triggers"),
    scaleTargetRef=_closed(("name",), apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT,
    pollingInterval=_COUNT,
    cooldownPeriod=_COUNT,
    advanced=_closed(
        horizontalPodAutoscalerConfig=_closed(
            behavior=_closed(scaleUp=_BEHAVIOUR, scaleDown=_BEHAVIOUR)
        )
    ),
    triggers={"type": "array", "minItems": 1, "items": _TRIGGER},
)
_SERVICE_MONITOR = _closed(
    ("selector", "endpoints"),
    selector=_closed(matchLabels=_TEXTS),
    endpoints={
        "type": "array",
        "minItems": 1,
        "items": _closed(("port",), port=_TEXT, path=_TEXT, interval={"pattern": r"^\d+s$"}),
    },
)
_RULE = _closed(
    ("expr",),
    alert=_TEXT,
    record=_TEXT,
    expr=_TEXT,
    labels=_TEXTS,
    annotations=_TEXTS,
    **{"for": {"pattern": r"^\d+[smhd]$"}},
)
_PROMETHEUS_RULE = _closed(
    ("groups",),
    groups={
        "type": "array",
        "minItems": 1,
        "items": _closed(
            ("name", "rules"), name=_TEXT, rules={"type": "array", "minItems": 1, "items": _RULE}
        ),
    },
)
# Its pod templates are checked as pod templates, by the schema of Kubernetes.
_TEMPLATE = _closed(("metadata", "spec"), metadata={"type": "object"}, spec={"type": "object"})
_LEADER_WORKER_SET = _closed(
    ("leaderWorkerTemplate",),
    replicas=_COUNT,
    startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
    rolloutStrategy=_closed(
        ("type",),
        type={"const": "RollingUpdate"},
        rollingUpdateConfiguration=_closed(maxUnavailable=_COUNT, maxSurge=_COUNT),
    ),
    leaderWorkerTemplate=_closed(
        ("workerTemplate", "size"),
        size={"type": "integer", "minimum": 1},
        restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
        leaderTemplate=_TEMPLATE,
        workerTemplate=_TEMPLATE,
    ),
)
SCHEMAS: dict[str, Schema] = {
    "ScaledObject": _resource("keda.sh/v1alpha1", "ScaledObject", _SCALED_OBJECT),
    "ServiceMonitor": _resource("monitoring.coreos.com/v1", "ServiceMonitor", _SERVICE_MONITOR),
    "PrometheusRule": _resource("monitoring.coreos.com/v1", "PrometheusRule", _PROMETHEUS_RULE),
    "LeaderWorkerSet": _resource(
        "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", _LEADER_WORKER_SET
    ),
}
