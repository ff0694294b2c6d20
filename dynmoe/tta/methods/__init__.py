"""Methods of test-time adaptation. A new one: a file, and a line here."""

from dynmoe.tta.methods.becotta import Becotta as Becotta
from dynmoe.tta.methods.cotta import Cotta as Cotta
from dynmoe.tta.methods.deyo import Deyo as Deyo
from dynmoe.tta.methods.eata import Eata as Eata
from dynmoe.tta.methods.mgtta import Mgtta as Mgtta
from dynmoe.tta.methods.moetta import Moetta as Moetta
from dynmoe.tta.methods.noadapt import NoAdapt as NoAdapt
from dynmoe.tta.methods.sar import Sar as Sar
from dynmoe.tta.methods.tent import Tent as Tent
