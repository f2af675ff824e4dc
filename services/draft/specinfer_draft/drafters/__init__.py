"""Drafters: what guesses. One so far, `model.ModelDrafter`; the next ones take the same calls.

    open(session_id, epoch, token_ids, sampling, num_prompt_tokens, *, owner)
                                                    start to follow a session, or replace it
    propose(session_id, query, future)              take what was committed, then guess
    close(session_id)                               forget the session
    close_stream(stream)                            forget those that this stream opened last
    run_pass() -> bool                              one unit of work; whether there was any

All calls come from one thread, the engine's. The committed tokens of a session move only by
`propose`, whose query says how many of the tokens held are right and which ones follow. The answer
goes into the future, at once where a lookup is enough and after some passes where a model has to
run. An error raised by `open` or `propose` is the answer to that call alone.
"""
