"""Customer service: what a caller wants, and in what mood, from voice and words.

    python -m vl_jax train --config=joint/service --workdir=runs/service
    python -m vl_jax sweep --config=joint/service --sweep=emotion --workdir=runs/emotions
    python -m vl_jax sweep --config=joint/service --sweep=agreement --workdir=runs/agreements

Moods: acted Polish speech (``nemo_emotion``), of which every sentence is said in every mood, beside a line of
English dialogue (``meld_text``). They were not recorded together: a line has the mood of the voice seven
times out of ten. Wants: questions to a bank (``banking77``), written only. One model learns both; voices and
lines that it is judged by are of speakers and episodes that training lacks.
"""

from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.media.wave import WaveConfig
from vl_jax.data.sources.build import MatchedConfig
from vl_jax.data.sources.filters.matched import SameKind
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.series.recurrent import RecurrentConfig
from vl_jax.encoders.sound.spectrogram import SpectrogramConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.fusion.mixing import Mixing
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

TOKENS = 64
AGREEMENT = 0.7  # how often a line has the mood of the voice
MOODS = {  # in the two sets
    "anger": "anger",
    "fear": "fear",
    "happiness": "joy",
    "neutral": "neutral",
    "sadness": "sadness",
    "surprised": "surprise",
}
WANTS = """
Refund_not_showing_up activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up
balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit
beneficiary_not_allowed cancel_transfer card_about_to_expire card_acceptance card_arrival
card_delivery_estimate card_linking card_not_working card_payment_fee_charged card_payment_not_recognised
card_payment_wrong_exchange_rate card_swallowed cash_withdrawal_charge cash_withdrawal_not_recognised
change_pin compromised_card contactless_not_working country_support declined_card_payment
declined_cash_withdrawal declined_transfer direct_debit_payment_not_recognised disposable_card_limits
edit_personal_details exchange_charge exchange_rate exchange_via_app extra_charge_on_statement
failed_transfer fiat_currency_support get_disposable_virtual_card get_physical_card getting_spare_card
getting_virtual_card lost_or_stolen_card lost_or_stolen_phone order_physical_card passcode_forgotten
pending_card_payment pending_cash_withdrawal pending_top_up pending_transfer pin_blocked receiving_money
request_refund reverted_card_payment? supported_cards_and_currencies terminate_account
top_up_by_bank_transfer_charge top_up_by_card_charge top_up_by_cash_or_cheque top_up_failed top_up_limits
top_up_reverted topping_up_by_card transaction_charged_twice transfer_fee_charged transfer_into_account
transfer_not_received_by_recipient transfer_timing unable_to_verify_identity verify_my_identity
verify_source_of_funds verify_top_up virtual_card_not_working visa_or_mastercard why_verify_identity
wrong_amount_of_cash_received wrong_exchange_rate_for_cash_withdrawal
"""
MOOD = "calls: macro_f1"
_HEAD, _FUSION = "model.heads.mood.stream", "model.fusion"


def ablation_emotion():
    """Voice, words, both; and both by a transformer over all tokens."""
    small = {"dim": 64, "mlp_dim": 128, "num_layers": 1}
    layers = {f"{_FUSION}.layers.{name}": value for name, value in small.items()}
    return Ablation(
        arms=(
            Arm("voice", {_HEAD: "voice", _FUSION: "Apart"}),
            Arm("words", {_HEAD: "text", _FUSION: "Apart"}),
            Arm("both", {_HEAD: "fused"}),
            Arm("both_transformer", {_HEAD: "fused", _FUSION: "FusionTransformer", **layers}),
        ),
        metric=MOOD,
        better="higher",
        claims=(
            Claim(
                *("both", "voice", MOOD, "higher"),
                says="voice and words beat either for emotion (an article on multimodal systems)",
            ),
            Claim(*("both", "words", MOOD, "higher"), says="the same, beside words"),
            Claim(*("both_transformer", "both", MOOD, "open"), says="which way to read both is better"),
        ),
        equal=("steps", "samples"),
        columns=("calls: accuracy", "questions: accuracy"),
        says="Do voice and words together tell a mood better than either?",
    )


def ablation_agreement():
    """Words that tell nothing of the voice, that agree as often as not, and always."""

    def agreeing(rate: float) -> dict:
        return {f"data.{part}.calls.agreement": rate for part in ("sources", "evaluation")}

    return Ablation(
        arms=tuple(Arm(f"agree_{round(100 * rate)}", agreeing(rate)) for rate in (1 / 6, 0.5, 1.0)),
        metric=MOOD,
        better="higher",
        claims=(
            Claim(*("agree_100", "agree_17", MOOD, "higher"), says="words help if they agree (our own)"),
            Claim(*("agree_50", "agree_17", MOOD, "open"), says="from which agreement on"),
        ),
        equal=("steps", "samples"),
        says="How often do words have to agree with the voice?",
    )


def get_config():
    """The experiment."""
    voice = SpectrogramConfig(
        AudioConfig(num_bands=40, max_seconds=3.2),
        norm="sound",
        recurrent=RecurrentConfig(hidden_dim=48, bidirectional=True),
    )
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=TOKENS,
        embed_dim=64,
        mlp_dim=192,
        num_layers=2,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    heads = (
        Classification(tuple(MOODS), name="mood", field="emotion", stream="fused"),
        Classification(tuple(WANTS.split()), name="want", field="category", stream="text"),
    )
    rate = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=30, final_fraction=0.03)
    return config.view(
        Experiment(
            name="service",
            model=JointConfig(
                (Tower("voice", voice, "voice"), Tower("text", text, "tokens")),
                heads,
                Mixing(dim=64, dropout=0.2),
            ),
            data=DataConfig(
                root="../shared/data",
                sources=(_calls("train"), _questions("train")),
                evaluation=(_calls("val"), _questions("test")),
                max_tokens=TOKENS,
                tiling=TilingConfig(tile_size=8),  # rows have a tile, even if nothing is on it
            ),
            stages=(
                Stage("learn", steps=400, batch_size=32, objective=Heads(("mood", "want")), optimizer=rate),
            ),
            loop=LoopConfig(log_every=20, checkpoint_every=1000),
            evaluation=EvaluationConfig(task=Labels(head="", groups=("gender",)), batch_size=64),
        )
    )


def _calls(split):
    voices = RecordsConfig(
        "voices",
        f"nemo_emotion/{split}.json",
        labels=("emotion", "gender"),
        media=(WaveConfig("voice", field="audio"),),
    )
    lines = RecordsConfig(
        "lines",
        f"meld_text/{'test' if split == 'val' else split}_sent_emo.csv",
        text="Utterance",
        labels=("Emotion",),
    )
    kinds = tuple(SameKind((ours,), (theirs,)) for ours, theirs in MOODS.items())
    # Few voices: in training each comes with several lines, or the lines would be learnt by heart.
    partners = 1 if split == "val" else 12
    return MatchedConfig("calls", voices, lines, ("emotion", "Emotion"), kinds, AGREEMENT, partners)


def _questions(split):
    return RecordsConfig("questions", f"banking77/{split}.csv", text="text", labels=("category",))
