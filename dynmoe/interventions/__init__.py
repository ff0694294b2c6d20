"""What keeps any network plastic. A new one: a class in one of these files, and a line here."""

from dynmoe.interventions.architecture import CReLU as CReLU
from dynmoe.interventions.architecture import Injection as Injection
from dynmoe.interventions.architecture import LayerNormIntervention as LayerNormIntervention
from dynmoe.interventions.architecture import NaP as NaP
from dynmoe.interventions.freezing import Freeze as Freeze
from dynmoe.interventions.intervention import NoIntervention as NoIntervention
from dynmoe.interventions.penalties import EWC as EWC
from dynmoe.interventions.penalties import L2 as L2
from dynmoe.interventions.penalties import L2Init as L2Init
from dynmoe.interventions.penalties import Parseval as Parseval
from dynmoe.interventions.penalties import Spectral as Spectral
from dynmoe.interventions.perturbing import DASH as DASH
from dynmoe.interventions.perturbing import FIRE as FIRE
from dynmoe.interventions.perturbing import HareTortoise as HareTortoise
from dynmoe.interventions.perturbing import HeadReset as HeadReset
from dynmoe.interventions.perturbing import ShrinkPerturb as ShrinkPerturb
from dynmoe.interventions.resetting import CBP as CBP
from dynmoe.interventions.resetting import SNR as SNR
from dynmoe.interventions.resetting import ReDo as ReDo
