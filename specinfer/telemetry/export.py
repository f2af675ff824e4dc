"""Spans on their way to a collector: OpenTelemetry's own machinery, set up within our bounds.

Needs the `tracing` extra, and imports it only when asked to. This module knows nothing of what is
traced.
"""

from __future__ import annotations

from specinfer.errors import InvalidRequest
from specinfer.telemetry.traces import Library, Telemetry, TraceSettings

MAX_EVENTS = 64
MAX_QUEUED_SPANS = 8192
SEND_MILLIS = 1000
EXPORT_SECONDS = 5


def set_up_tracing(service: str, settings: TraceSettings, *, instance: str = "") -> Telemetry:
    """Spans of a service to the collector that `settings` name.

    Nothing waits for the collector: what does not fit into the bounded queue is dropped.

    Raises:
        InvalidRequest: OpenTelemetry is not installed.
    """
    try:
        library = _load(service, settings, instance)
    except ImportError as error:
        raise InvalidRequest(
            "tracing needs the package opentelemetry-exporter-otlp-proto-grpc; "
            "install it or leave the endpoint out",
            field="otlp_endpoint",
        ) from error
    return library


def _load(service: str, settings: TraceSettings, instance: str) -> Telemetry:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    about = {"service.name": service, "service.namespace": "specinfer"}
    if instance:
        about["service.instance.id"] = instance
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(settings.ratio),
        resource=Resource.create(about),
        span_limits=SpanLimits(max_events=MAX_EVENTS),
        shutdown_on_exit=False,
    )
    # TLS is what https:// says; certificates and headers come from OpenTelemetry's own variables.
    exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=EXPORT_SECONDS)
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter, max_queue_size=MAX_QUEUED_SPANS, schedule_delay_millis=SEND_MILLIS
        )
    )
    library = Library(
        trace, Context(), TraceContextTextMapPropagator(), provider.get_tracer("specinfer")
    )
    return Telemetry(library, provider, exporter, settings.rounds)
