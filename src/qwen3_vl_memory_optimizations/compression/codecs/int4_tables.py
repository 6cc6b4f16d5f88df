"""The 256 tables of `int4`, learned from normally distributed values.

`tools/train_int4_tables.py` writes this file.
"""

from __future__ import annotations

import base64
from functools import lru_cache

import torch

UNITS_PER_DEVIATION = 25.4
"""Integers of the tables per standard deviation of the values: 127 are five."""

_HALF = (
    "=<M<I`1}3;0t5#M3=k9=?eX;Y`uzX`1qTWZ5EK_2>F@LQ`TYL^1P2KW5EB<0=<f3M`TPC=0|p2S4iXg{>hSdU`uzX{1qcfc5fm96=<xLS`uz"
    "X{1qcfc5*8XC>hSdV`~Cq01_=xg6BipH=IrqE_WAt(0t5#N4G|R_<?8P9_WAt(0tE;Q4iXj~=I-+L`uzX{1_=xh6BryJ<LK@2_4)k&0tE;Q4"
    "-*$4=I-<N`u+g~2MP@l6&W5Q;p*=4_4)k&0tE;R5EU6A<m~YD`1}6?1qcfd6BivK<?ZtJ`uza}2MZ1o78@WY;OFe|_4)k&0|p5V5fvIE;_L7"
    "8_xt_=1qcie6c`;P<LvPC`27C^1_=!j6&fEX;OXx2_xt_=1qlog6&fEU-skM`_4)k(1P2Qb6BisL-s$f1_xt|>1_=!k791fc+~(`=^!WS#0t"
    "N~W5*HjM;pp%5`1}9_2MZ4q7ab!h;_LDC`TYR|2n-Mu86G4n-s$i3`27I{2n-Pw8XzVu-RJG{_xt|?2MZ4q7#<`m+T`i(^Y{Dz0tN~W6B!;T"
    "+2QBy^7i`v0tN~X6Br^X+U4u-^!WS$1PBZf78@Zd*W~H$^Y{Dz0|*Qd6&fEa*5T*v^7i`v0tO2Z6&oQf+2!i+^!fb(1qluk7#$-m*5m5%_4)"
    "n+1_}=o7#=1q+UD!<_4@t;2MZ7s8XzVw*yQW+_WJ(=2n-Px93m+(*5m2!^Z5M%1qu%o86YMz)!^pr@%H-v0|*Tf7ab!m)!yam@AUco0tO2Z6"
    "&oQj)8gmt^7s1y1PKii7#<`t(%j|j@%H=w1PBch7ab=r(%a<f@AUcp0tXBd7aSrq&)?<i@b>%v1PKlk7#<}x)8OXp^7s4!1_}=q8zCn)(c9+"
    "i^7i`x1qlxn86Yb((A?tb@Adls0|*Th86YV!&fDVY@AUcp0|yKe7#$-x&)wwe@b>!v1qu%o8X+e-&e!AV@AUcp0|*Th86YS%)Zpmu^!fe+2n"
    "`b$A15z2(%<In^7s4!1`81v9V9F|$=l)R?(_Nn0|*Wj8X+h+&)(<l^ZEV*2@Vt*At*0B%+%xQ@AUfr1PKon8zL(>%-ZGa@%Q`z1`H7xA0{q2"
    "%G=}V@b&rt1qu)r93?9|$JgNJ?eqEn1PKom8zU+^%-rMb^7#D%2n`Y#9wsq9%iQGZ@%Q`!2MrS%At^CJ$l2lO@Adis1q%=t9wjY5$=BlQ@b>"
    "%x2MiJ!ASf|A#Ma*B?DP2k0|^fm9V9G2#M$BK@Adlu1`HAy9w#qD$=c-X^7#G(2@e$<BP}*W#@6BL@%Q}#2o4k)A}cjP#?;;C?ezKo1q%@uA"
    "15+F!PVX5>+<;i1PTxq9wshA!PwvC?)Cct2MrP!A1pLI!r0&F@Adis1`QM%At*LRz}4L4?DP2m1q%@vAt^CNztG_3?)3Tq1`HD#AuTpTzSiF"
    "8?)3Ws2o4k)BPudW#n|EK@Amux2o4n-BrP~dz0cj`>hbvg1PTxrA0{tI!_nX7?)Cct2oDt;BrY~gyVBX=>hbsf1Pc-vA1X9Qz{%R;>G1ab0|"
    "^ipASf_PyVTp|?DP5m1`HD$A}cgZxz5+(>G1dc0}2rsA}cdZywlv~?ezNs2o4n;BQH8d!OPm@>+|{l1`HD#B`!Bezt-L8@Amxz3J@0_B{4cq"
    "yU^I=?eqEo2M!e+CNVrnw$j_;>+<;k1`QM(BrG;kyVKp~@Amux2@n?_C^A1&y3N<&>hbvg1q>4#A}~2gx5wGw=kNCY1Pc-xAuKddv(VS%>+|"
    "~p2oDw>CNMZsvd!4x>GJvi1`QM&A~HQpzs}g??DYEq2oD$^C^bM#v&-7z?DP5o2oDw>Dl$A*xzO9??e+Tt3K1D0D>y<{vC7ol=<oLa1q>1zB"
    "rG;mxyIGt>hbsh2M!e-C@?!uw!+un=kWLb1q~G)B`!KtuFTfq>GAmg2M-q>B{o7+uE)^d=kNCX0}B)!BQH2wx6Rez>+|{n2oD$`EHyq{w!+i"
    "f<?i(S0}2uvBQH5!vAova<?Z(U1q>4%C@?rzu*A>a<?QtP0}B%zCp17$uEfyX=kfUd1`QM-Co()&tjf~h=kNCZ1`ZY-EHpk`w8+-q>GS#l2@"
    "x3~EjmS7slU$L=I-_U1Pm1&Cow`_v&hlg=I{3X1q~G)Cptt>ue{US<?Z(V1q~M<Dl<J}sm0UW=<xUe2M-q?C@@D_smapc=<)dg2oM+`C^<x6"
    "ti#OS=kE9Z2M!h@D>p!Aq{PkF<n8qQ0}K@&COJb}p2g4H<?Z$T1r8P<D>X@0vBK5h>hk&l2@xD7F*`?Nr@qPB<nQ+W1q~J<Fgin9q{PqL=kf"
    "Re2oV_}Dn3VHtG>|N<n8wW2@n_{FE~PKti#LM=I;0Z2oV`1Ej&<RsKC<R>G1gh3lke8Ge1dlpvKPK=J5Fg3K1D4GCM|UsJF`5<m~nR1rHb?C"
    "^biBpTNr1;p_DN2M!h=C_P4CnX=H><n8wT2M`$}EjL4K&D`Vc^7s4!1`7}t93v|=mcq^2<nQ<Z2oM`4FF;Ur(%|Ut_4@z?3J?_>BPudHr@+e"
    "C<nH$W2NE19GCW6rn7_%@<LvbO1PvA;DKb=PqqD%*;Og`I1r8S=E;vMSkh{s(;_UVP1q~P?EI3Mi"
)
"""128 tables of 16 ascending bytes; the others are their mirror images."""


@lru_cache(maxsize=1)
def tables() -> torch.Tensor:
    """Return int8 `[256, 16]`, ascending in each row."""
    with torch.inference_mode(False):
        half = torch.frombuffer(bytearray(base64.b85decode("".join(_HALF))), dtype=torch.int8).view(128, 16)
        return torch.cat([half, -half.flip(1)])
